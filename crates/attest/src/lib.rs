//! Attestation: evidence, init data, the RCAR messages, attestation results, the guest's side of the exchange.
