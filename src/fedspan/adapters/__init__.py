"""PEFT LoRA adapters as folders and as state dicts, read and written strictly, and checks that they fit together."""
