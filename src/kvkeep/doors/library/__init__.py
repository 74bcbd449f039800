"""The door for an engine of your own: `CacheEngine`, in the calling thread, without a scheduler."""
