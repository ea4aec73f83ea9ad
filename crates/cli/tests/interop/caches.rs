//! HTTP caches between a guest and the registry: nginx with its slice module, which keeps answers to Range requests. It is not trusted.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nacre_testkit::{DockerRegistry, DockerRegistryOptions, Entry, Image, Rng, require, root, run};

use crate::support::Place;

struct Nginx {
    child: Child,
    host: String,
    directory: PathBuf,
}

impl Nginx {
    fn start(directory: &Path, upstream: &str) -> Option<Self> {
        let program = require("nginx")?;
        fs::create_dir_all(directory).unwrap();
        let host = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let at = directory.display();
        let config = format!(
            "daemon off; user root; worker_processes 1; pid {at}/pid; error_log {at}/error.log;
             events {{}}
             http {{
                 log_format cache '$upstream_cache_status $http_x_dragonfly_registry $request';
                 access_log {at}/access.log cache;
                 client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
                 uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;
                 proxy_cache_path {at}/cache keys_zone=blobs:1m;
                 server {{
                     listen {host};
                     location ~ ^/v2/.*/blobs/ {{
                         slice 256k;
                         proxy_cache blobs; proxy_cache_key $uri$slice_range; proxy_cache_valid 200 206 1h;
                         proxy_set_header Range $slice_range; proxy_http_version 1.1;
                         proxy_pass http://{upstream};
                     }}
                     location / {{ proxy_pass http://{upstream}; }}
                 }}
             }}"
        );
        fs::write(directory.join("nginx.conf"), config).unwrap();
        let mut command = Command::new(program);
        command.arg("-c").arg(directory.join("nginx.conf")).arg("-e").arg(directory.join("error.log"));
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let started = Self { child, host, directory: directory.to_owned() };
        let begin = Instant::now();
        while std::net::TcpStream::connect(&started.host).is_err() {
            let log = fs::read_to_string(directory.join("error.log")).unwrap_or_default();
            assert!(begin.elapsed() < Duration::from_secs(20), "nginx does not listen: {log}");
            thread::sleep(Duration::from_millis(20));
        }
        Some(started)
    }

    /// The requests for parts of blobs since the last time.
    fn requests(&self) -> Vec<String> {
        let path = self.directory.join("access.log");
        let log = fs::read_to_string(&path).unwrap();
        File::options().write(true).truncate(true).open(path).unwrap();
        log.lines().filter(|line| line.contains("/blobs/")).map(str::to_owned).collect()
    }

    /// Changes a byte in each thing that it keeps.
    fn poison(&self) -> usize {
        let (mut pending, mut poisoned) = (vec![self.directory.join("cache")], 0);
        while let Some(path) = pending.pop() {
            if path.is_dir() {
                pending.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
                continue;
            }
            let mut bytes = fs::read(&path).unwrap();
            // The answer's body ends the file.
            let at = bytes.len() - 100;
            bytes[at] ^= 1;
            fs::write(path, bytes).unwrap();
            poisoned += 1;
        }
        poisoned
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        run(Command::new("kill").arg(self.child.id().to_string()));
        self.child.wait().unwrap();
    }
}

/// The content of everything in an image, read by a guest with a store of its own.
fn read(place: &Place, store: &str, image: &str, options: &[&str]) -> String {
    let target = place.at(store).with_extension("mounted");
    fs::create_dir(&target).unwrap();
    let key = place.text("key.pem");
    let mut nacre = place.nacre(store, &["image", "mount", "--decryption-key", &key, "--insecure-registry"]);
    run(nacre.arg("--insecure-policy").args(options).arg(image).arg(&target));
    let script = "find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum";
    let read = run(Command::new("sh").args(["-c", script]).current_dir(&target));
    run(place.nacre(store, &["image", "umount"]).arg(&target));
    String::from_utf8(read.stdout).unwrap()
}

#[test]
fn an_http_cache_serves_what_it_has_and_is_not_believed() {
    if !root() {
        return;
    }
    let (Some(openssl), Some(registry)) =
        (require("openssl"), DockerRegistry::start(&DockerRegistryOptions { basic_auth: false, tls: None }))
    else {
        return;
    };
    let place = Place::new();
    let Some(nginx) = Nginx::start(&place.at("nginx"), registry.host()) else { return };
    for arguments in
        ["genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem", "pkey -in key.pem -pubout -out key.pub"]
    {
        run(place.program(&openssl).args(arguments.split(' ')));
    }
    let mut random = Rng::new(1);
    let file = |number: usize, random: &mut Rng| Entry::file(format!("file{number}"), random.bytes(100_000));
    let image = Image::builder().layer((0..20).map(|number| file(number, &mut random)).collect::<Vec<_>>()).build();
    image.write_layout(&place.at("layout"), "v1");
    let name = format!("docker://{}/cached:v1", registry.host());
    let encrypt = format!("jwe:{}", place.text("key.pub"));
    let mut copy = place.nacre("copy", &["image", "copy", "--lazy", "--insecure-registry", "--encrypt", &encrypt]);
    run(copy.arg(format!("oci:{}:v1", place.text("layout"))).arg(&name));

    let right = read(&place, "without", &name, &[]);
    let cache = format!("http://{}", nginx.host);
    let through = ["--node-cache", cache.as_str()];
    assert_eq!(read(&place, "first", &name, &through), right);
    let origin = format!("http://{} GET", registry.host());
    let first = nginx.requests();
    assert!(!first.is_empty() && first.iter().all(|line| line.contains(&origin)), "{first:?}");
    assert_eq!(read(&place, "second", &name, &through), right);
    let second = nginx.requests();
    assert!(second.iter().any(|line| line.starts_with("HIT ")), "{second:?}");
    assert!(!second.iter().any(|line| line.starts_with("MISS ")), "{second:?}");

    // Two megabytes at one a second; the first quarter is not waited for.
    let begin = Instant::now();
    assert_eq!(read(&place, "slow", &name, &["--bandwidth", "1M"]), right);
    assert!(begin.elapsed() > Duration::from_millis(1200), "{:?}", begin.elapsed());

    // What it changes is seen, and had from the registry.
    assert!(nginx.poison() > 0);
    assert_eq!(read(&place, "third", &name, &through), right);
    // And so it is when it is gone.
    drop(nginx);
    assert_eq!(read(&place, "fourth", &name, &through), right);
}
