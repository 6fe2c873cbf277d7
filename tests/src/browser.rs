//! A real browser, Chromium, driven by its own driver through the WebDriver protocol.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::process::Process;
use crate::{http, scratch, wait};

/// How WebDriver names a reference to an element (W3C WebDriver, 11).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A window of a browser that nobody else uses. It ends when this is dropped.
pub struct Browser {
    _driver: Process,
    port: u16,
    session: String,
}

impl Browser {
    pub async fn start() -> Result<Self> {
        let port = scratch::free_port()?;
        let profile = scratch::dir("chromium")?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "chromedriver", &format!("--port={port}")]);
        command.env("HOME", &profile).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (driver, _) = Process::adopt("chromedriver", command)?;
        let look = async || Ok((http::get(port, "/status").await?.0 == 200).then_some(()));
        wait::until("chromedriver", wait::LONG, look).await?;
        let mut browser = Browser { _driver: driver, port, session: String::new() };
        let profile = format!("--user-data-dir={}", profile.display());
        let arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            &profile,
        ];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": { "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL" } } } });
        let made = browser.send("POST", "/session", &wanted).await?;
        browser.session = made["sessionId"].as_str().context("no session")?.to_owned();
        Ok(browser)
    }

    async fn send(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = if method == "GET" { String::new() } else { body.to_string() };
        let answer = http::request(self.port, method, path, &[("content-type", "application/json")], &body).await?;
        let mut value = answer.json()?;
        ensure!(answer.status == 200, "{method} {path}: {}", value["value"]["message"]);
        Ok(value["value"].take())
    }

    async fn post(&self, path: &str, body: Value) -> Result<Value> {
        self.send("POST", &format!("/session/{}/{path}", self.session), &body).await
    }

    pub async fn go(&self, url: &str) -> Result<()> {
        self.post("url", json!({ "url": url })).await.map(drop)
    }

    /// Runs a function's body in the page and returns its result.
    pub async fn run(&self, script: &str) -> Result<Value> {
        self.post("execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// The same, awaiting a promise.
    pub async fn run_async(&self, expression: &str) -> Result<Value> {
        let script = format!("const done = arguments[0]; ({expression}).then(done, (e) => done('failed: ' + e))");
        self.post("execute/async", json!({ "script": script, "args": [] })).await
    }

    async fn find(&self, selector: &str) -> Result<String> {
        let found = self.post("element", json!({ "using": "css selector", "value": selector })).await?;
        Ok(found[ELEMENT].as_str().context("no element")?.to_owned())
    }

    /// Clicks as a user does: on what is there to be clicked.
    pub async fn click(&self, selector: &str) -> Result<()> {
        let look = async || {
            let element = self.find(selector).await?;
            self.post(&format!("element/{element}/click"), json!({})).await.map(Some)
        };
        wait::until(&format!("a click on {selector}"), wait::LONG, look).await.map(drop)
    }

    pub async fn type_into(&self, selector: &str, text: &str) -> Result<()> {
        let element = self.find(selector).await?;
        self.post(&format!("element/{element}/value"), json!({ "text": text })).await.map(drop)
    }

    /// A key, to whatever has the focus; WebDriver names those without a character (17.4.2).
    pub async fn press(&self, key: &str) -> Result<()> {
        let actions = json!([{ "type": "key", "id": "keys", "actions": [
            { "type": "keyDown", "value": key }, { "type": "keyUp", "value": key } ] }]);
        self.post("actions", json!({ "actions": actions })).await.map(drop)
    }

    /// Waits until an expression of the page is true.
    pub async fn until(&self, expression: &str) -> Result<()> {
        let script = format!("return Boolean({expression})");
        let look = async || Ok((self.run(&script).await? == true).then_some(()));
        wait::until(expression, Duration::from_secs(30), look).await
    }

    /// Waits for an element.
    pub async fn until_there(&self, selector: &str) -> Result<()> {
        self.until(&format!("document.querySelector({})", json!(selector))).await
    }

    /// The size of the page itself, and `light` or `dark`.
    pub async fn looks(&self, width: u32, height: u32, theme: &str) -> Result<()> {
        for (cmd, params) in [
            (
                "Emulation.setDeviceMetricsOverride",
                json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false }),
            ),
            ("Emulation.setEmulatedMedia", json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] })),
        ] {
            self.post("goog/cdp/execute", json!({ "cmd": cmd, "params": params })).await?;
        }
        Ok(())
    }

    /// A PNG of what the window shows.
    pub async fn screenshot(&self, file: &Path) -> Result<()> {
        let shot = self.send("GET", &format!("/session/{}/screenshot", self.session), &Value::Null).await?;
        Ok(std::fs::write(file, STANDARD.decode(shot.as_str().context("no screenshot")?)?)?)
    }

    /// What pages wrote to the console since it was last asked for.
    pub async fn console(&self) -> Result<Vec<String>> {
        let log = self.post("se/log", json!({ "type": "browser" })).await?;
        let lines = log.as_array().context("no log")?;
        Ok(lines.iter().map(|line| line["message"].as_str().unwrap_or_default().to_owned()).collect())
    }
}

impl Drop for Browser {
    /// The driver ends its browser when it is asked to, and not when it is killed.
    fn drop(&mut self) {
        let ended = || -> std::io::Result<()> {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            let path = format!("/session/{}", self.session);
            write!(stream, "DELETE {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            stream.read(&mut [0; 64]).map(drop)
        };
        if let Err(error) = ended() {
            eprintln!("the browser may still run: {error}");
        }
    }
}
