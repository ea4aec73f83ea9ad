//! Images whose keys were lent: they are read for as long as the lease holds.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use nacre_attest::client::Tenure;
use nacre_lazy::{
    device::DeviceReader,
    reader::{Failure, ReadError},
    source::BlobId,
};

/// A reader that gives nothing any more when its tenure has ended.
pub(super) struct LentReader {
    reader: Arc<dyn DeviceReader>,
    tenure: Arc<Tenure>,
    refused: Mutex<Option<Failure>>,
}

impl LentReader {
    pub(super) fn new(reader: Arc<dyn DeviceReader>, tenure: Arc<Tenure>) -> Self {
        Self { reader, tenure, refused: Mutex::default() }
    }

    fn check(&self) -> Result<(), ReadError> {
        let Some(why) = self.tenure.ended() else { return Ok(()) };
        let error = ReadError::GivenUp(why.to_owned());
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.is_none() {
            tracing::error!("{error}");
            *refused = Some(Failure { reason: error.to_string(), at: SystemTime::now() });
        }
        Err(error)
    }
}

impl DeviceReader for LentReader {
    fn size(&self) -> u64 {
        self.reader.size()
    }

    fn content_bytes(&self) -> u64 {
        self.reader.content_bytes()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), ReadError> {
        self.check()?;
        self.reader.read_at(offset, out)
    }

    fn complete(&self, step: &mut dyn FnMut(u64) -> bool) -> Result<(), ReadError> {
        self.reader.complete(&mut |done| self.check().is_ok() && step(done))?;
        self.check()
    }

    fn failure(&self) -> Option<Failure> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
        refused.or_else(|| self.reader.failure())
    }

    fn blobs(&self) -> Vec<BlobId> {
        self.reader.blobs()
    }

    fn read_bytes(&self) -> u64 {
        self.reader.read_bytes()
    }
}
