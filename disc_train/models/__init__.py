"""Load causal language models and prepare them: adapters, teachers, attention, hidden states and output heads."""
