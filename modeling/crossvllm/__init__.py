"""CrossVLLM: one backbone that sees a whole video coarsely and a part of it finely."""
