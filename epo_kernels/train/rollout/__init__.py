"""Playing episodes: prompts, engines, and the loop between them."""
