//! A browser that nobody looks at: Chromium, driven by chromedriver over WebDriver.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::require;

/// The member of an element's reference, by the WebDriver standard.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// For so long something is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// A headless Chromium with one window. It ends when this is dropped.
#[derive(Debug)]
pub struct Browser {
    driver: Driver,
    session: String,
}

/// An element of the page.
#[derive(Debug)]
pub struct Element<'a> {
    browser: &'a Browser,
    id: String,
}

impl Browser {
    /// Starts one; `None`, after a loud skip, where Chromium or chromedriver is not installed. Certificates that nobody signed are taken.
    pub fn start() -> Option<Self> {
        let (chromium, driver) = (require("chromium")?, require("chromedriver")?);
        let driver = Driver::start(Command::new(driver));
        let arguments = [
            "--headless=new",
            // Tests run as root in containers, where there is neither a sandbox nor room in /dev/shm.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            "--window-size=1280,900",
            "--lang=en",
        ];
        let capabilities = json!({"capabilities": {"alwaysMatch": {
            "acceptInsecureCerts": true,
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"binary": chromium, "args": arguments},
        }}});
        let session = driver.call("POST", "/session", &capabilities);
        let session = session["sessionId"].as_str().unwrap_or_else(|| panic!("no session: {session}")).to_owned();
        Some(Self { driver, session })
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let answer = self.driver.call(method, &format!("/session/{}{path}", self.session), body);
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(format!("{error}: {}", answer["message"].as_str().unwrap_or_default())),
            None => Ok(answer),
        }
    }

    fn must(&self, method: &str, path: &str, body: &Value) -> Value {
        self.call(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Opens an address.
    pub fn open(&self, url: &str) {
        self.must("POST", "/url", &json!({"url": url}));
    }

    /// The address that is shown.
    pub fn url(&self) -> String {
        text(&self.must("GET", "/url", &Value::Null))
    }

    /// The title of the page.
    pub fn title(&self) -> String {
        text(&self.must("GET", "/title", &Value::Null))
    }

    /// All elements that a CSS selector matches.
    pub fn all(&self, css: &str) -> Vec<Element<'_>> {
        let found = self.must("POST", "/elements", &json!({"using": "css selector", "value": css}));
        let ids = found.as_array().into_iter().flatten().map(|found| text(&found[ELEMENT]));
        ids.map(|id| Element { browser: self, id }).collect()
    }

    /// The first element that a CSS selector matches; waits for it.
    pub fn find(&self, css: &str) -> Element<'_> {
        self.wait(css, || {
            let mut found = self.all(css);
            if found.is_empty() { None } else { Some(found.swap_remove(0)) }
        })
    }

    /// Waits until something is there.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            if start.elapsed() > PATIENCE {
                panic!("there is no {what} in {}:\n{}\n{}", self.url(), self.page(), self.log().join("\n"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a heading of the first level says this.
    pub fn heading(&self, wanted: &str) {
        let look = || self.all("h1").iter().any(|found| found.text_now().as_deref() == Some(wanted)).then_some(());
        self.wait(&format!("heading '{wanted}'"), look);
    }

    /// The text of the page, as it is seen.
    pub fn page(&self) -> String {
        text(&self.script("return document.body.innerText"))
    }

    /// Runs a script in the page; gives what it returns.
    pub fn script(&self, script: &str) -> Value {
        self.must("POST", "/execute/sync", &json!({"script": script, "args": []}))
    }

    /// Presses keys, one after the other, wherever the focus is.
    pub fn press(&self, keys: &[Key]) {
        let strokes = keys.iter().flat_map(|key| key.strokes());
        let actions: Vec<Value> =
            strokes.map(|(down, key)| json!({"type": if down { "keyDown" } else { "keyUp" }, "value": key})).collect();
        self.must("POST", "/actions", &json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}));
    }

    /// The element that has the focus.
    pub fn focused(&self) -> Element<'_> {
        let found = self.must("GET", "/element/active", &Value::Null);
        Element { browser: self, id: text(&found[ELEMENT]) }
    }

    /// Presses Tab until an element that a CSS selector matches has the focus.
    pub fn tab_to(&self, css: &str) -> Element<'_> {
        let is_it = |css: &str| self.script(&format!("return document.activeElement.matches({})", json!(css))) == true;
        for _ in 0..60 {
            self.press(&[Key::Tab]);
            if is_it(css) {
                return self.focused();
            }
        }
        panic!("Tab does not lead to {css}:\n{}", self.page());
    }

    /// What the browser logged since the last time: errors of scripts, what a policy blocked, requests that failed.
    pub fn log(&self) -> Vec<String> {
        let entries = self.must("POST", "/se/log", &json!({"type": "browser"}));
        entries.as_array().into_iter().flatten().map(|entry| text(&entry["message"])).collect()
    }

    /// A command of Chromium's own protocol.
    pub fn chromium(&self, command: &str, parameters: &Value) -> Value {
        self.must("POST", "/goog/cdp/execute", &json!({"cmd": command, "params": parameters}))
    }

    /// A picture of the window, PNG in base64.
    pub fn screenshot(&self) -> String {
        text(&self.must("GET", "/screenshot", &Value::Null))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.call("DELETE", "", &Value::Null);
    }
}

impl Element<'_> {
    fn get(&self, what: &str) -> Result<Value, String> {
        self.browser.call("GET", &format!("/element/{}/{what}", self.id), &Value::Null)
    }

    fn must(&self, what: &str) -> String {
        text(&self.get(what).unwrap_or_else(|error| panic!("{what}: {error}")))
    }

    /// Its text, as it is seen.
    pub fn text(&self) -> String {
        self.must("text")
    }

    /// Its text; `None` where it is gone.
    pub fn text_now(&self) -> Option<String> {
        self.get("text").ok().map(|found| text(&found))
    }

    /// Its role, as a screen reader is told.
    pub fn role(&self) -> String {
        self.must("computedrole")
    }

    /// Its name, as a screen reader is told.
    pub fn label(&self) -> String {
        self.must("computedlabel")
    }

    /// An attribute; empty where there is none.
    pub fn attribute(&self, name: &str) -> String {
        self.must(&format!("attribute/{name}"))
    }

    /// Whether it can be seen.
    pub fn is_shown(&self) -> bool {
        self.get("displayed").is_ok_and(|shown| shown == true)
    }

    /// Clicks it.
    pub fn click(&self) {
        self.browser.must("POST", &format!("/element/{}/click", self.id), &json!({}));
    }

    /// Types into it.
    pub fn enter(&self, keys: &str) {
        self.browser.must("POST", &format!("/element/{}/value", self.id), &json!({"text": keys}));
    }
}

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// To the next element.
    Tab,
    /// To the one before.
    BackTab,
    /// Follows a link, presses a button.
    Enter,
    /// Presses a button.
    Space,
}

impl Key {
    /// Down or up, and the key's value by the WebDriver standard.
    fn strokes(self) -> Vec<(bool, &'static str)> {
        let press = |key: &'static str| vec![(true, key), (false, key)];
        match self {
            Self::Tab => press("\u{e004}"),
            Self::BackTab => [vec![(true, "\u{e008}")], press("\u{e004}"), vec![(false, "\u{e008}")]].concat(),
            Self::Enter => press("\u{e007}"),
            Self::Space => press(" "),
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| if value.is_null() { String::new() } else { value.to_string() }, str::to_owned)
}

/// chromedriver, on a port of the loopback device.
#[derive(Debug)]
struct Driver {
    child: Child,
    port: u16,
    // Where it keeps the profile: removed with it.
    _home: tempfile::TempDir,
}

impl Driver {
    fn start(mut command: Command) -> Self {
        let home = tempfile::tempdir().unwrap();
        command.arg("--port=0").env("HOME", home.path()).env("TMPDIR", home.path());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.split_once("started successfully on port ")?.1.trim_end_matches('.').parse().ok());
        let Some(port) = port else { panic!("chromedriver does not start") };
        // What it says later must not fill the pipe.
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, port, _home: home }
    }

    /// A call; gives the answer's value, which is an error's where there is one.
    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.port,
            body.len()
        );
        stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
        }
        let mut answer = vec![0; length];
        reader.read_exact(&mut answer).unwrap();
        let mut answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        answer["value"].take()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
