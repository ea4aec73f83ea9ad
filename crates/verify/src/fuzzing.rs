//! Parsers that a fuzzer reaches only here: before them stands a signature.

/// What a TPM signs, and its signature.
pub fn tpm(bytes: &[u8]) {
    let _ = (crate::tpm::wire::quote(bytes).is_ok(), crate::tpm::wire::signature(bytes).is_ok());
    let _ = std::str::from_utf8(bytes)
        .map(|text| (crate::dcap::tcb::TcbInfo::parse(text).is_ok(), crate::dcap::tcb::Identity::parse(text).is_ok()));
}

/// What a guest says of its TPM's keys, before a certificate vouches for any of it; the authorities of an operator.
pub fn enrolment(bytes: &[u8]) {
    let _ = crate::tpm::enrol::EkRoots::parse(bytes).is_ok();
    crate::tpm::enrol::parse_areas(bytes);
}
