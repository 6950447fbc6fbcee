"""What is checked and measured, one stage a file, each with `run(place)`."""
