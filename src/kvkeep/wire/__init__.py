"""What an engine knows of a store: the messages between them, an engine's end of the socket, starting the process."""
