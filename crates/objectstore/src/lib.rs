//! A block store on an object store.
