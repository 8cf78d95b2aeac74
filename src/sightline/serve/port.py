"""The port that the server listens on. Imports nothing heavy, so that a port in use is told at once."""

import socket


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free.

    Raises:
        OSError: the port is in use, or the address is not one of this machine.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose another --port or --host") from error
