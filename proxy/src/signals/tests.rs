//! Against a real server in this process.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::fetch::{FetchError, Fetcher, MAX_PAGE};
use super::{Config, Port, Signals, Where, run};

/// A server with one page.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    page: Arc<Page>,
    task: JoinHandle<()>,
}

struct Page {
    path: String,
    text: Mutex<String>,
    asked: AtomicUsize,
}

impl Server {
    pub(super) async fn start(path: &str, text: &str) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), path, text).await
    }

    async fn start_at(address: SocketAddr, path: &str, text: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let page = Arc::new(Page {
            path: path.to_owned(),
            text: Mutex::new(text.to_owned()),
            asked: AtomicUsize::default(),
        });
        let router = Router::new().fallback(serve).with_state(Arc::clone(&page));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, page, task }
    }

    fn set(&self, text: &str) {
        *self.page.text.lock().unwrap() = text.to_owned();
    }

    fn asked(&self) -> usize {
        self.page.asked.load(Relaxed)
    }

    /// As a declared port of the pod.
    fn port(&self) -> Port {
        Port { address: self.address, declared: true }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(State(page): State<Arc<Page>>, request: Request) -> Response {
    page.asked.fetch_add(1, Relaxed);
    match request.uri().path() {
        "/moved" => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, page.path.clone())]).into_response(),
        "/slow" => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            "late".into_response()
        }
        "/large" => "a 1\n".repeat(MAX_PAGE / 4 + 1).into_response(),
        path if path == page.path => page.text.lock().unwrap().clone().into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

const LIMIT: Duration = Duration::from_secs(5);

fn vllm(waiting: u32) -> String {
    format!(
        "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting {waiting}\nvllm:kv_cache_usage_perc 0.5\n"
    )
}

/// Signals that are being followed.
struct Followed {
    signals: Arc<Signals>,
    epoch: Instant,
    task: JoinHandle<()>,
}

impl Followed {
    fn start(server: Where, ports: Arc<Mutex<Vec<Port>>>) -> Self {
        let (signals, epoch) = (Arc::new(Signals::default()), Instant::now());
        let every = Duration::from_millis(10);
        let config = Config { server, every, nvml: None, ..Config::default() };
        let ports = move || ports.lock().unwrap().clone();
        let task = tokio::spawn(run(config, Arc::clone(&signals), ports, epoch));
        Self { signals, epoch, task }
    }

    fn waiting(&self) -> Option<f64> {
        self.signals.load(self.epoch.elapsed()).waiting
    }

    async fn until(&self, waiting: Option<f64>) {
        let seen = async {
            while self.waiting() != waiting {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(20), seen).await;
        assert!(seen.is_ok(), "{:?} is seen, not {waiting:?}", self.waiting());
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn shared(ports: &[Port]) -> Arc<Mutex<Vec<Port>>> {
    Arc::new(Mutex::new(ports.to_vec()))
}

#[tokio::test]
async fn the_page_is_found_among_the_pods_ports_and_followed() {
    let stranger = Server::start("/metrics", "go_goroutines 7\n").await;
    let untouched = Server::start("/metrics", &vllm(99)).await;
    let model = Server::start("/metrics", &vllm(3)).await;
    let undeclared = Port { declared: false, ..untouched.port() };
    let followed = Followed::start(Where::Detect, shared(&[stranger.port(), undeclared, model.port()]));
    followed.until(Some(3.0)).await;
    model.set(&vllm(8));
    followed.until(Some(8.0)).await;
    assert_eq!(followed.signals.load(followed.epoch.elapsed()).kv_usage, Some(0.5));
    assert_eq!(untouched.asked(), 0, "a port of which nobody said that it speaks HTTP is left alone");
    assert!(stranger.asked() <= 2, "a stranger is not asked once the page is found");
}

#[tokio::test]
async fn a_declared_page_is_read_where_it_was_declared() {
    let server = Server::start("/custom", "tgi_queue_size 4\n").await;
    let place = format!("tgi:{}/custom", server.address.port()).parse().unwrap();
    let followed = Followed::start(place, shared(&[]));
    followed.until(Some(4.0)).await;
}

#[tokio::test]
async fn a_server_that_comes_late_goes_away_and_moves_is_followed() {
    let ports = shared(&[]);
    let followed = Followed::start(Where::Detect, Arc::clone(&ports));
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(followed.waiting(), None, "no port, no signal");

    let first = Server::start("/metrics", &vllm(1)).await;
    ports.lock().unwrap().push(first.port());
    followed.until(Some(1.0)).await;

    // It dies: what it said is forgotten, and it is found where it comes up again.
    drop(first);
    followed.until(None).await;
    let second = Server::start("/prometheus/metrics", "trtllm_num_requests_waiting 2\n").await;
    *ports.lock().unwrap() = vec![second.port()];
    followed.until(Some(2.0)).await;
}

#[tokio::test]
async fn nonsense_in_place_of_a_page_is_not_told_as_load() {
    let server = Server::start("/metrics", &vllm(5)).await;
    let followed = Followed::start(Where::Detect, shared(&[server.port()]));
    followed.until(Some(5.0)).await;
    server.set("<html>Bad Gateway</html>");
    followed.until(None).await;
    server.set(&vllm(6));
    followed.until(Some(6.0)).await;
}

#[tokio::test]
async fn a_page_is_whole_and_bounded_or_an_error() {
    let server = Server::start("/metrics", "up 1\n").await;
    let mut fetcher = Fetcher::new(server.address.to_string());
    assert_eq!(fetcher.get("/metrics", LIMIT).await.unwrap(), b"up 1\n");
    assert_eq!(fetcher.get("/moved", LIMIT).await.unwrap(), b"up 1\n", "a redirect is followed");
    let error = fetcher.get("/nothing", LIMIT).await.unwrap_err();
    assert!(error.answered() && error.to_string().contains("404"), "{error}");
    assert!(matches!(fetcher.get("/large", LIMIT).await, Err(FetchError::TooLarge(_))));
    let began = Instant::now();
    let late = fetcher.get("/slow", Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(late, FetchError::Late(..)) && began.elapsed() < LIMIT, "{late}");
    assert!(matches!(fetcher.get("not a path", LIMIT).await, Err(FetchError::Path(..))));
    assert_eq!(fetcher.get("/metrics", LIMIT).await.unwrap(), b"up 1\n", "and it goes on");
    let port = server.address.port();
    drop(server);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let error = Fetcher::new(format!("127.0.0.1:{port}")).get("/metrics", LIMIT).await.unwrap_err();
    assert!(!error.answered() && error.to_string().contains("cannot be connected to"), "{error}");
}

#[tokio::test]
async fn a_connection_is_kept_and_one_that_was_closed_is_made_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Two answers on each connection; the last of all breaks off in its middle.
    let server = tokio::spawn(async move {
        let mut answers = 0;
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().await.unwrap();
            for _ in 0..2 {
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                answers += 1;
                let length = if answers == 5 { 100 } else { 5 };
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\nup 1\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                if answers == 5 {
                    return;
                }
            }
        }
    });
    let mut fetcher = Fetcher::new(address.to_string());
    for look in 0..4 {
        assert_eq!(fetcher.get("/metrics", LIMIT).await.unwrap(), b"up 1\n", "look {look}");
        // The server closes after every second answer.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let cut = fetcher.get("/metrics", LIMIT).await.unwrap_err();
    assert!(matches!(cut, FetchError::Http(..)), "{cut}");
    server.await.unwrap();
}
