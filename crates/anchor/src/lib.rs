//! Places that a host cannot turn back.
