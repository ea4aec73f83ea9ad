//! Requests to an object store, several at a time, from synchronous code.

use std::{future::Future, ops::Range, sync::Arc, sync::mpsc};

use bytes::Bytes;
use futures_util::StreamExt as _;
use object_store::{Error, GetOptions, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, path::Path};
use tokio::{runtime::Runtime, sync::Semaphore};

use crate::{Location, ObjectStoreError};

/// Requests that are under way at once; more wait their turn.
const PARALLEL: usize = 16;

/// Threads that carry them out: what they do is wait, copy and encrypt.
const THREADS: usize = 2;

/// What a store wants of an object store. Names are below the store's prefix; each request of several has an outcome of its own.
pub(crate) trait Objects: Send + Sync {
    /// All objects, with their sizes; fails where there are more than `limit`.
    fn list(&self, limit: u64) -> Result<Vec<(String, u64)>, Error>;

    /// Reads ranges of objects. An answer may be of another length, where the object has no more.
    fn get(&self, ranges: Vec<(String, Range<u64>)>) -> Vec<Result<Bytes, Error>>;

    /// Makes objects that are not there yet: [`Error::AlreadyExists`] where one is, unless it has this very content.
    fn create(&self, objects: Vec<(String, Bytes)>) -> Vec<Result<(), Error>>;

    /// Makes or replaces one object.
    fn replace(&self, name: &str, content: Bytes) -> Result<(), Error>;

    /// Whether there is such an object.
    fn exists(&self, name: &str) -> Result<bool, Error>;

    /// Removes objects; one that is not there was removed.
    fn delete(&self, names: Vec<String>) -> Vec<Result<(), Error>>;
}

/// [`Objects`] of a [`Location`].
pub(crate) struct Remote {
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
    turns: Arc<Semaphore>,
    store: Arc<dyn ObjectStore>,
    prefix: String,
}

impl Remote {
    pub(crate) fn new(location: &Location) -> Result<Self, ObjectStoreError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("nacre-objects")
            .enable_all()
            .build()
            .map_err(ObjectStoreError::Threads)?;
        Ok(Self {
            runtime: Some(runtime),
            turns: Arc::new(Semaphore::new(PARALLEL)),
            store: Arc::clone(&location.store),
            prefix: location.prefix.clone(),
        })
    }

    fn path(&self, name: &str) -> Result<Path, Error> {
        let path = if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        Ok(Path::parse(path)?)
    }

    /// Runs a request for each input, and waits. Not by block_on: the caller's thread may belong to another runtime.
    fn run<I, T, F>(
        &self,
        inputs: Vec<I>,
        request: impl Fn(Arc<dyn ObjectStore>, Result<Path, Error>, I) -> F,
    ) -> Vec<Result<T, Error>>
    where
        I: AsRef<str>,
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel();
        let mut outcomes: Vec<Result<T, Error>> = Vec::with_capacity(inputs.len());
        for (index, input) in inputs.into_iter().enumerate() {
            outcomes.push(Err(Error::Generic { store: "nacre", source: "the request was given up".into() }));
            let path = self.path(input.as_ref());
            let (sender, turns) = (sender.clone(), Arc::clone(&self.turns));
            let future = request(Arc::clone(&self.store), path, input);
            if let Some(runtime) = &self.runtime {
                runtime.spawn(async move {
                    let _turn = turns.acquire().await;
                    // Nobody listens only where the caller is gone, and then nobody needs the answer.
                    let _ = sender.send((index, future.await));
                });
            }
        }
        drop(sender);
        for (index, outcome) in receiver {
            if let Some(slot) = outcomes.get_mut(index) {
                *slot = outcome;
            }
        }
        outcomes
    }

    fn run_one<T, F>(
        &self,
        name: &str,
        request: impl Fn(Arc<dyn ObjectStore>, Result<Path, Error>, String) -> F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let gone = || Err(Error::Generic { store: "nacre", source: "the request was given up".into() });
        self.run(vec![name.to_owned()], request).pop().unwrap_or_else(gone)
    }
}

/// An input with a name.
struct Named<T>(String, T);

impl<T> AsRef<str> for Named<T> {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

fn named<T>(inputs: Vec<(String, T)>) -> Vec<Named<T>> {
    inputs.into_iter().map(|(name, input)| Named(name, input)).collect()
}

impl Objects for Remote {
    fn list(&self, limit: u64) -> Result<Vec<(String, u64)>, Error> {
        let prefix = if self.prefix.is_empty() { None } else { Some(Path::parse(&self.prefix)?) };
        let skip = prefix.as_ref().map_or(0, |prefix| prefix.as_ref().len() + 1);
        self.run_one("list", move |store, _, _| {
            let prefix = prefix.clone();
            async move {
                let mut found = Vec::new();
                let mut stream = store.list(prefix.as_ref());
                while let Some(object) = stream.next().await {
                    let object = object?;
                    if found.len() as u64 >= limit {
                        let source = format!("there are more than {limit} objects, more than a store has").into();
                        return Err(Error::Generic { store: "nacre", source });
                    }
                    let name = object.location.as_ref().get(skip..).unwrap_or_default().to_owned();
                    found.push((name, object.size));
                }
                Ok(found)
            }
        })
    }

    fn get(&self, ranges: Vec<(String, Range<u64>)>) -> Vec<Result<Bytes, Error>> {
        self.run(named(ranges), |store, path, Named(_, range)| async move {
            let options = GetOptions { range: Some(range.into()), ..GetOptions::default() };
            store.get_opts(&path?, options).await?.bytes().await
        })
    }

    fn create(&self, objects: Vec<(String, Bytes)>) -> Vec<Result<(), Error>> {
        self.run(named(objects), |store, path, Named(_, content)| async move {
            let path = path?;
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            match store.put_opts(&path, PutPayload::from_bytes(content.clone()), options).await {
                Ok(_) => Ok(()),
                // The answer to an earlier try of this request may have been lost; then what is there is ours.
                Err(error @ Error::AlreadyExists { .. }) => {
                    let there = store.get(&path).await?.bytes().await?;
                    if there == content { Ok(()) } else { Err(error) }
                }
                Err(error) => Err(error),
            }
        })
    }

    fn replace(&self, name: &str, content: Bytes) -> Result<(), Error> {
        self.run_one(name, move |store, path, _| {
            let content = content.clone();
            async move { store.put(&path?, PutPayload::from_bytes(content)).await.map(drop) }
        })
    }

    fn exists(&self, name: &str) -> Result<bool, Error> {
        self.run_one(name, |store, path, _| async move {
            match store.head(&path?).await {
                Ok(_) => Ok(true),
                Err(Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        })
    }

    fn delete(&self, names: Vec<String>) -> Vec<Result<(), Error>> {
        self.run(names, |store, path, _| async move {
            match store.delete(&path?).await {
                Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // To wait for threads is forbidden inside of another runtime, and nothing is under way that anybody waits for.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
