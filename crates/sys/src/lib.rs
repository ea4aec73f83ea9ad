//! The operating system: mounts, namespaces, and everything else that needs unsafe.
