"""The store's end of the channel: which clients may join, their answers, and the memory that ended clients may use."""
