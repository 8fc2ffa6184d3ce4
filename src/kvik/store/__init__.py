"""Bytes of blocks by digest, for longer than a process lives. No arrays here."""

from kvik.store.base import Fault, Store, StoredBlock, StoreStats
from kvik.store.files import FileStore

__all__ = ["Fault", "FileStore", "Store", "StoreStats", "StoredBlock"]
