"""CrossLMM: dual cross-attention as patches of a decoder."""
