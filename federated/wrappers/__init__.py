"""Wrappers around any algorithm: compression of uploads and downloads, secure sums."""
