//! The key broker: sessions, appraisal, policies, resources; its HTTP service and storage.
