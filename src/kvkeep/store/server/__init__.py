"""The store's end of the channel: who may come in, turns, answers, and what lingers after a client."""
