//! Development only: image and archive makers, faults, fixtures, real programs for tests.
