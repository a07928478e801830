//! The daemon's `/metrics` page.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// A page in the Prometheus text format.
#[derive(Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Fetches the page.
    ///
    /// # Errors
    /// If the answer is not 200.
    pub fn fetch(console: SocketAddr) -> Result<Self> {
        let mut stream = TcpStream::connect_timeout(&console, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.lines().next().unwrap_or_default();
        ensure!(status.contains(" 200 "), "/metrics answered {status}");
        Ok(Self(body.to_owned()))
    }

    /// The sum of a metric's samples whose labels contain `label`, as in `volume="data"`; `None` if there is none.
    pub fn value(&self, metric: &str, label: &str) -> Option<f64> {
        let samples = self.0.lines().filter(|line| {
            let rest = line.strip_prefix(metric);
            rest.is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        });
        let values = samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }

    /// The page as it was served.
    pub fn text(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_label() {
        let page =
            "# HELP a x\na_total{volume=\"v\"} 3\na_total{volume=\"w\"} 4\na_total_more{volume=\"v\"} 9\n";
        let metrics = Metrics(page.to_owned());
        assert_eq!(metrics.value("a_total", "volume=\"v\""), Some(3.0));
        assert_eq!(metrics.value("a_total", ""), Some(7.0));
        assert_eq!(metrics.value("b_total", ""), None);
    }
}
