//! The guest's daemon: no broker and no builder in its dependency tree.

fn main() {}
