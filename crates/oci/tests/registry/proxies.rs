//! Requests through an HTTP proxy.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use nacre_oci::{
    registry::{ClientConfig, CredentialStore, FromEnv, ProxyConfig},
    source::ImageSource as _,
};
use nacre_testkit::registry::Registry;

use crate::support::{client_with, descriptor, fetch, noise, quick, source};

/// A proxy that connects everybody to `target`, whatever name they ask for, and remembers what they said.
fn proxy(target: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let log = Arc::new(Mutex::new(Vec::new()));
    let heads = log.clone();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let (target, heads) = (target.clone(), heads.clone());
            thread::spawn(move || {
                let mut reader = BufReader::new(client.try_clone().unwrap());
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    if reader.read_line(&mut head).unwrap_or(0) == 0 {
                        return;
                    }
                }
                heads.lock().unwrap().push(head.clone());
                let mut client = client;
                if !head.starts_with("CONNECT ") {
                    let _ = client.write_all(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n");
                    return;
                }
                let server = TcpStream::connect(target).unwrap();
                client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").unwrap();
                let (mut up, mut down) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let mut server = server;
                thread::spawn(move || {
                    let _ = std::io::copy(&mut reader, &mut up);
                    let _ = up.shutdown(std::net::Shutdown::Write);
                });
                let _ = std::io::copy(&mut server, &mut down);
                let _ = down.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    (address, log)
}

fn through(proxy: &str, no_proxy: &[&str]) -> ClientConfig {
    let url = format!("http://user:pass@{proxy}");
    let no_proxy = no_proxy.iter().map(|entry| (*entry).to_owned()).collect();
    let proxy = ProxyConfig { from_env: FromEnv(false), https: Some(url.clone()), http: Some(url), no_proxy };
    ClientConfig { proxy, retries: 0, ..quick() }
}

#[test]
fn requests_pass_through_the_proxy() {
    let blob = noise(200_000);
    let registry = Registry::memory().unwrap();
    registry.put_blob(&blob).unwrap();
    let (address, log) = proxy(registry.host());
    let (client, _) = client_with(through(&address, &[]), "", CredentialStore::anonymous());
    // The name is the proxy's to resolve.
    assert_eq!(fetch(&source(&client, "registry.invalid:5000/a:b"), &descriptor(&blob)).unwrap(), blob);
    let heads = log.lock().unwrap();
    assert!(heads.iter().all(|head| head.starts_with("CONNECT registry.invalid:5000 ")), "{heads:?}");
    assert!(heads.iter().all(|head| head.contains("Proxy-Authorization: Basic dXNlcjpwYXNz")), "{heads:?}");
    assert!(registry.requests().iter().all(|request| request.header("proxy-authorization").is_none()));
}

#[test]
fn named_hosts_and_loopback_are_reached_directly() {
    let registry = Registry::memory().unwrap();
    let (address, log) = proxy(registry.host());
    for (name, no_proxy) in [(registry.host(), vec![]), ("registry.invalid:5000".to_owned(), vec![".invalid"])] {
        let (client, _) = client_with(through(&address, &no_proxy), "", CredentialStore::anonymous());
        let _ = source(&client, &format!("{name}/a:b")).manifest(None);
    }
    assert_eq!(log.lock().unwrap().len(), 0);
}

#[test]
fn a_proxy_that_refuses_is_named() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (client, _) = client_with(through(&closed, &[]), "", CredentialStore::anonymous());
    assert!(source(&client, "registry.invalid/a:b").manifest(None).is_err());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for mut client in listener.incoming().map_while(Result::ok) {
            // The whole request: what is left unread would reset the connection, and the answer with it.
            let mut reader = BufReader::new(client.try_clone().unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).is_ok_and(|read| read > 0) {}
            let _ = client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n");
        }
    });
    let (client, _) = client_with(through(&address, &[]), "", CredentialStore::anonymous());
    let error = source(&client, "registry.invalid/a:b").manifest(None).unwrap_err().to_string();
    assert!(error.contains("proxy") && error.contains("407") && !error.contains("pass@"), "{error}");
}
