//! A copy that fails leaves the destination as it was.
