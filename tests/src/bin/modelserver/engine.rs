//! Runs models on threads of their own, behind a bounded queue.
//!
//! In: a request. Out: its answer, or why there is none. When all threads are busy and the queue is full, a request is
//! refused at once. A request whose client has gone is not run.

use crate::delay::DelayModel;
use crate::model::Model;
use crate::refusal::Refusal;
use crate::stats::{add, add_time};
use penstock_inference::oip::{InferRequest, InferResponse};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// The way to the threads. They end when it is dropped.
pub(crate) struct Engine {
    queue: mpsc::Sender<Job>,
}

struct Job {
    model: Arc<Model>,
    request: InferRequest,
    rows: u64,
    queued: Instant,
    reply: oneshot::Sender<Result<InferResponse, Refusal>>,
}

impl Engine {
    /// Starts the threads.
    pub(crate) fn start(
        threads: NonZeroUsize,
        queue: NonZeroUsize,
        delay: Option<DelayModel>,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(queue.get());
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..threads.get() {
            let receiver = receiver.clone();
            let work = move || {
                while let Some(job) = next(&receiver) {
                    job.run(delay);
                }
            };
            std::thread::Builder::new().name(format!("infer-{number}")).spawn(work)?;
        }
        Ok(Self { queue: sender })
    }

    /// Asks a model.
    pub(crate) async fn infer(
        &self,
        model: &Arc<Model>,
        request: InferRequest,
    ) -> Result<InferResponse, Refusal> {
        let stats = &model.stats;
        let queued = Instant::now();
        let rows = model.check(&request).inspect_err(|_| add(&stats.other, 1))?;
        let (reply, answer) = oneshot::channel();
        add(&stats.pending, 1);
        let job = Job { model: model.clone(), request, rows, queued, reply };
        if self.queue.try_send(job).is_err() {
            stats.pending.fetch_sub(1, Relaxed);
            add(&stats.rejected, 1);
            let waiting = self.queue.max_capacity();
            return Err(Refusal::Busy(format!(
                "{waiting} requests wait already, which is all that may; try another replica or later"
            )));
        }
        let answer = answer.await.unwrap_or_else(|_| Err(Refusal::Failed("the server stopped".into())));
        if answer.is_ok() {
            add(&stats.success, 1);
            add_time(&stats.request_us, queued.elapsed());
        }
        answer
    }
}

/// One thread at a time waits for the next job; the others wait for their turn to do so.
fn next(receiver: &Mutex<mpsc::Receiver<Job>>) -> Option<Job> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv()
}

impl Job {
    fn run(self, delay: Option<DelayModel>) {
        let stats = &self.model.stats;
        stats.pending.fetch_sub(1, Relaxed);
        if self.reply.is_closed() {
            add(&stats.canceled, 1);
            return;
        }
        add_time(&stats.queue_us, self.queued.elapsed());
        // A model that panics costs its request, not the thread.
        let answer = match catch_unwind(AssertUnwindSafe(|| self.execute(delay))) {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(problem)) => Err(format!("the model failed: {problem:#}")),
            Err(_) => Err("the model panicked".into()),
        };
        let answer = answer.map_err(|sentence| {
            add(&stats.backend, 1);
            tracing::error!("{}:{}: {sentence}", self.model.identity.name, self.model.identity.version);
            Refusal::Failed(sentence)
        });
        // Nobody waits for it any more: the client left while it ran.
        if self.reply.send(answer).is_err() {
            add(&stats.canceled, 1);
        }
    }

    fn execute(&self, delay: Option<DelayModel>) -> anyhow::Result<InferResponse> {
        let (model, stats) = (&self.model, &self.model.stats);
        let start = Instant::now();
        let inputs = model.inputs(&self.request)?;
        let made = Instant::now();
        let found = model.run(inputs)?;
        if let Some(delay) = delay {
            wait_until(made + delay.service_time(self.rows));
        }
        let ran = Instant::now();
        let outputs = model.outputs(&self.request, &found)?;
        add_time(&stats.input_us, made - start);
        add_time(&stats.infer_us, ran - made);
        add_time(&stats.output_us, ran.elapsed());
        add(&stats.executions, 1);
        add(&stats.rows, self.rows);
        Ok(InferResponse {
            model_name: model.identity.name.clone(),
            model_version: model.identity.version.clone(),
            id: self.request.id.clone(),
            outputs,
            ..InferResponse::default()
        })
    }
}

/// Occupies this thread as the simulated GPU would be. Finer than the runtime's timer, which counts milliseconds.
fn wait_until(deadline: Instant) {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return;
        }
        std::thread::park_timeout(left);
    }
}
