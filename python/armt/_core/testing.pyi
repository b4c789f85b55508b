"""
Single operations of the CPU backend, for tests.
"""
from __future__ import annotations
import armt._core
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['Cache', 'Operations', 'available_isas', 'set_poison']
class Cache:
    """
    Keys and values of one stream at one layer.
    """
    def __init__(self) -> None:
        ...
    def roll(self, keep: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def previous_rows(self) -> int:
        ...
    @property
    def rows(self) -> int:
        ...
class Operations:
    """
    A CPU backend whose allocations are filled with NaN.
    """
    def __init__(self, decoder: dict, memory: dict, *, threads: typing.SupportsInt | typing.SupportsIndex = 1, isa: str = '', weight_dtype: str = 'float32') -> None:
        ...
    def attend(self, caches: collections.abc.Sequence[Cache], counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], qkv: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], sights: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], visible: collections.abc.Sequence[typing.Annotated[numpy.typing.ArrayLike, numpy.uint8] | None], prev_visible: collections.abc.Sequence[typing.Annotated[numpy.typing.ArrayLike, numpy.uint8] | None], layer: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def export_kv(self, cache: Cache, previous: bool = False) -> tuple:
        ...
    def feature_map(self, x: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], rolls: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def import_kv(self, cache: Cache, k: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], v: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> None:
        ...
    def load(self, name: str, layer: typing.SupportsInt | typing.SupportsIndex, values: typing.Annotated[numpy.typing.ArrayLike, numpy.float32]) -> None:
        ...
    def memory_read(self, x: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], memories: collections.abc.Sequence[tuple[typing.Annotated[numpy.typing.ArrayLike, numpy.float32], typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None] | None], counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], layer: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def memory_write(self, y: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], memories: collections.abc.Sequence[tuple[typing.Annotated[numpy.typing.ArrayLike, numpy.float32], typing.Annotated[numpy.typing.ArrayLike, numpy.float32] | None] | None], counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], write_rows: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], in_place: bool = False, layer: typing.SupportsInt | typing.SupportsIndex = 0) -> list:
        ...
    def rotate_queries(self, qkv: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], positions: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], layer: typing.SupportsInt | typing.SupportsIndex = 0) -> numpy.typing.NDArray[numpy.float32]:
        ...
    def store_kv(self, caches: collections.abc.Sequence[Cache], counts: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], qkv: typing.Annotated[numpy.typing.ArrayLike, numpy.float32], positions: typing.Annotated[numpy.typing.ArrayLike, numpy.int64], layer: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    @property
    def isa(self) -> str:
        ...
def available_isas() -> list[str]:
    ...
def set_poison(engine: armt._core.Engine, on: bool) -> None:
    """
    Fills new blocks and workspaces of a CPU engine with NaN, so that a value that was never written shows.
    """
