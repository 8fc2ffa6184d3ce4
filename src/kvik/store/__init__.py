"""Bytes of blocks by digest, for longer than a process lives. No arrays here."""

from kvik.store.base import Fault, Store, StoredBlock, StoreStats

__all__ = ["Fault", "Store", "StoreStats", "StoredBlock"]
