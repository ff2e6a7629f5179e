"""What the workers of `function_workers` call. Imported by each of them, so it imports nothing."""


def with_torch(number: int) -> int:
    import torch  # noqa: F401

    return number


def with_torch_to(queue, number: int) -> None:  # type: ignore[no-untyped-def]
    queue.put(with_torch(number))


def trivial(number: int) -> int:
    return number


def large(number: int, size: int) -> bytes | None:
    """A value of `size` bytes from one of the ranks, nothing from the others."""
    return bytes(size) if number == 2 else None
