"""Training: chat data and one fine-tuning loop over TRL, PEFT and accelerate."""
