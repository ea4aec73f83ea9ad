//! Parsers that a fuzzer reaches only here: before them stands a signature.

/// A CoRIM, whoever signed it: what it says is within its bounds.
pub fn corim(bytes: &[u8]) {
    let content = crate::corim::Signed::read(bytes).and_then(|signed| signed.content());
    if let Ok(content) = content {
        assert!(content.values.len() <= crate::reference::MOST_IDS);
        assert!(content.values.iter().all(|(name, values)| crate::reference::is_name(name) && !values.is_empty()));
    }
}
