"""Everything that makes a model or a drafter: corpus, tokenizer, losses, loops, evaluation."""
