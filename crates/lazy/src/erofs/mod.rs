//! EROFS metadata: made, checked and read.
