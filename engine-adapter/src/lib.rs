//! The Python module `swiftcache._native`.
