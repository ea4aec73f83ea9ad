//! The secure disk: a log-structured block device on a store that nobody trusts.
