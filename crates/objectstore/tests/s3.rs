//! The store on an S3 that is not ours, over HTTP.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test, at once and at its place")]

use std::{collections::HashMap, time::Instant};

use nacre_core::{BlockError, BlockStore, ReadRequest};
use nacre_objectstore::{Location, ObjectBlockStore, ObjectOptions, ObjectStoreError};
use nacre_testkit::{MotoServer, Rng, check_store};

const CHUNK: u64 = 256 << 10;
const SIZE: u64 = 8 * CHUNK;
const OPTIONS: ObjectOptions = ObjectOptions { chunk_size: CHUNK, buffer_bytes: 2 << 20, read_only: false };

fn location(server: &MotoServer, url: &str) -> Location {
    Location::s3(url, server.environment()).unwrap()
}

#[test]
fn objects_in_s3_are_a_store() {
    let Some(server) = MotoServer::start() else { return };
    server.make_bucket("volumes");
    let place = location(&server, "s3://volumes/a/b");
    check_store(5, 80, |before: Option<ObjectBlockStore>| match before {
        None => ObjectBlockStore::create(&place, SIZE, OPTIONS).unwrap(),
        Some(_) => ObjectBlockStore::open(&place, OPTIONS).unwrap(),
    });

    // A neighbour whose prefix begins alike is not seen.
    let other = location(&server, "s3://volumes/a/bc");
    let store = ObjectBlockStore::create(&other, SIZE, OPTIONS).unwrap();
    let data = Rng::new(1).bytes(usize::try_from(SIZE).unwrap());
    let start = Instant::now();
    store.write_at(0, &data).unwrap();
    store.flush().unwrap();
    println!("{} MiB written in {:?}", SIZE >> 20, start.elapsed());
    let mut back = vec![0; data.len()];
    let start = Instant::now();
    let mut requests: Vec<_> =
        (0..).map(|at| at * 4096).zip(back.chunks_mut(4096)).map(|(at, to)| ReadRequest::new(at, to)).collect();
    store.read_many(&mut requests);
    assert!(requests.iter().all(|request| request.outcome.is_ok()));
    println!("{} reads of a block in {:?}", data.len() / 4096, start.elapsed());
    assert!(back == data);

    // Two writers notice each other, by the create-only PUTs of a server that is not ours.
    let second = ObjectBlockStore::open(&other, OPTIONS).unwrap();
    second.write_at(0, &[2; 4096]).unwrap();
    second.flush().unwrap();
    store.write_at(0, &[3; 4096]).unwrap();
    assert!(matches!(store.flush(), Err(BlockError::Fenced(_))));
    drop((store, second));
    let mut block = [0; 4096];
    ObjectBlockStore::open(&other, OPTIONS).unwrap().read_at(0, &mut block).unwrap();
    assert_eq!(block, [2; 4096]);
}

#[test]
fn what_s3_refuses_is_an_error_that_names_the_object() {
    let Some(server) = MotoServer::start() else { return };
    let place = location(&server, "s3://absent/a");
    let error = ObjectBlockStore::create(&place, SIZE, OPTIONS).unwrap_err();
    assert!(matches!(error, ObjectStoreError::Request { ref name, .. } if name == "nacre.json"), "{error}");
    server.make_bucket("absent");
    let error = ObjectBlockStore::open(&place, OPTIONS).unwrap_err().to_string();
    assert_eq!(error, "s3://absent/a is no store: there is no nacre.json");

    // A server that is gone: the reads end in errors, and what was written stays in memory.
    let mut environment: HashMap<_, _> = server.environment().into_iter().collect();
    environment.insert("AWS_ALLOW_HTTP".to_owned(), "true".to_owned());
    environment.insert("AWS_ENDPOINT_URL".to_owned(), server.endpoint().replace("http://", "https://"));
    let place = Location::s3("s3://absent/a", environment).unwrap();
    let error = ObjectBlockStore::open(&place, OPTIONS).unwrap_err();
    assert!(matches!(error, ObjectStoreError::Request { .. }), "TLS was not tried: {error}");
}

#[test]
fn a_runtime_of_the_callers_is_not_in_the_way() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = ObjectBlockStore::create(&Location::memory(), SIZE, OPTIONS).unwrap();
        store.write_at(0, &[1; 4096]).unwrap();
        store.flush().unwrap();
    });
}
