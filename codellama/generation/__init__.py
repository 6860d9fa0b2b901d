"""Generation: request → scheduler → runner → sampling → engine. Token ids in, token ids and text deltas out."""
