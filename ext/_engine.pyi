class Engine:
    backend: str
    version: str
    inputs: tuple[tuple[str, int, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, int, tuple[int, ...]], ...]
    stateful: bool

def trim_memory() -> None: ...
