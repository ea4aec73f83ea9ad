//! The NBD server, as clients of others and hostile ones see it, and the adapter for requests of any bytes.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

mod client;
mod disk;
mod memory;
mod programs;
mod protocol;
mod sectors;
mod server;
mod tls;

use std::{path::PathBuf, sync::Arc};

use memory::Memory;
use nacre_export::{
    FrontEnd as _, Served,
    nbd::{Listen, NbdServer, NbdSettings},
};

/// A server at a socket file, over memory or what else is there.
struct Fixture<S: ?Sized = Memory> {
    directory: tempfile::TempDir,
    store: Arc<S>,
    server: Option<NbdServer>,
}

impl Fixture {
    fn new(size: u64) -> Self {
        Self::with(Memory::new(size), |_| {})
    }

    fn with(store: Memory, change: impl FnOnce(&mut NbdSettings)) -> Self {
        let store = Arc::new(store);
        Self::of(store.clone(), store, change)
    }
}

impl<S: ?Sized> Fixture<S> {
    /// `served` is `store`, as servers know it.
    fn of(store: Arc<S>, served: Served, change: impl FnOnce(&mut NbdSettings)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut settings = NbdSettings::new(Listen::Unix(directory.path().join("nbd.sock")));
        change(&mut settings);
        let server = Some(NbdServer::start(served, settings).unwrap());
        Self { directory, store, server }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    fn uri(&self) -> String {
        self.server.as_ref().unwrap().device()
    }

    fn server(&self) -> &NbdServer {
        self.server.as_ref().unwrap()
    }

    fn stop(&mut self) -> std::io::Result<()> {
        self.server.take().unwrap().stop()
    }
}
