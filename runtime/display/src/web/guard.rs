//! What every request must pass and every answer carries.
//!
//! The host check keeps out pages of other sites whose name was pointed at this machine (DNS
//! rebinding); the headers keep a browser from running, framing or keeping anything.

use std::net::Ipv6Addr;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Site;

const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

/// Headers of every answer.
const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(CONTENT_SECURITY_POLICY),
    ),
    (
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    ),
    (
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
];

pub(super) async fn guard(State(site): State<Site>, request: Request, next: Next) -> Response {
    let mut response = if !host_is_ours(&request, &site.options.hosts) {
        (
            StatusCode::MISDIRECTED_REQUEST,
            "This server does not answer to that host name; the site file lists those it knows.\n",
        )
            .into_response()
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        (
            StatusCode::METHOD_NOT_ALLOWED,
            [(header::ALLOW, "GET, HEAD")],
            "These pages can only be read.\n",
        )
            .into_response()
    } else {
        next.run(request).await
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, value);
    }
    response
}

/// Whether the one `Host` header, and the address if it names a host too, is ours.
fn host_is_ours(request: &Request, hosts: &[String]) -> bool {
    let mut named = request.headers().get_all(header::HOST).iter();
    let (Some(host), None) = (named.next(), named.next()) else {
        return false;
    };
    host.to_str().is_ok_and(|host| is_known(host, hosts))
        && request
            .uri()
            .authority()
            .is_none_or(|authority| is_known(authority.as_str(), hosts))
}

fn is_known(host_and_port: &str, hosts: &[String]) -> bool {
    let Some(host) = without_port(host_and_port) else {
        return false;
    };
    ["localhost", "127.0.0.1", "[::1]"]
        .into_iter()
        .chain(hosts.iter().map(String::as_str))
        .any(|known| same_host(known, host))
}

/// The host of `host`, `host:port`, `[v6]` or `[v6]:port`.
fn without_port(host_and_port: &str) -> Option<&str> {
    let after_bracket = host_and_port.find(']').map_or(0, |at| at + 1);
    match host_and_port[after_bracket..].find(':') {
        None => Some(host_and_port),
        Some(colon) => {
            let (host, port) = host_and_port.split_at(after_bracket + colon);
            port[1..].parse::<u16>().ok().map(|_| host)
        }
    }
}

fn same_host(known: &str, host: &str) -> bool {
    let v6 = |text: &str| {
        text.trim_start_matches('[')
            .trim_end_matches(']')
            .parse::<Ipv6Addr>()
            .ok()
    };
    known.eq_ignore_ascii_case(host)
        || v6(known).is_some_and(|known| host.starts_with('[') && v6(host) == Some(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(host: &str) -> bool {
        is_known(host, &["Box-7.local".to_owned(), "fd00::7".to_owned()])
    }

    #[test]
    fn loopback_and_listed_hosts_are_known_with_any_port() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]",
            "[::1]:65535",
            "[0:0:0:0:0:0:0:1]:80",
            "box-7.local:8080",
            "[fd00::7]:8080",
        ] {
            assert!(known(host), "{host}");
        }
    }

    #[test]
    fn other_hosts_are_not_known() {
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.example:127.0.0.1",
            "localhost:80:80",
            "localhost:",
            "localhost:65536",
            "[::1",
            "::1",
            "[::2]",
            "[::1]evil",
            "user@localhost",
            "box-7.local.",
            "10.0.0.1",
        ] {
            assert!(!known(host), "{host}");
        }
    }
}
