"""PEFT LoRA adapter folders, read and written strictly, and whether they belong together."""
