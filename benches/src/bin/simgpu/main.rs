//! `penstock-simgpu`: a server whose service time follows a model of a GPU. The GPU is SIMULATED: nothing is computed, time
//! passes. It exists so that balancers can be compared with real processes, sockets and protocols on a machine without
//! GPUs, and says what it is in every answer (`server: penstock-simgpu`) and on its metrics page.
//!
//! One process is one replica with one GPU. `tensor` is a batching server of tensor models ([`tensor`]), `chat` a language
//! model with continuous batching and a prefix cache ([`llm`]). A request goes: [`serve`] reads it → [`device`] gives it to
//! the model with the time of day → the model says when it is done → the same way back.

mod device;
mod kv;
mod llm;
mod model;
mod oip;
mod openai;
mod pace;
mod page;
mod serve;
mod tensor;
mod tokens;

use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

use device::Device;
use pace::{Pace, Window};
use serve::{Served, Server};

const EXAMPLE: &str = "Examples:
  penstock-simgpu tensor --listen 127.0.0.1:8000 --speed 2
  curl -s 127.0.0.1:8000/v2/models/sim/infer -d '{\"inputs\":[{\"name\":\"x\",\"shape\":[2],\"datatype\":\"FP32\",\"data\":[0,0]}]}'
  penstock-simgpu chat --listen 127.0.0.1:8000 --slow '2s+1s*0.25'
  curl -sN 127.0.0.1:8000/v1/chat/completions -d '{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"stream\":true}'

The GPU is simulated. Exit status: 0 after SIGTERM or SIGINT, 1 otherwise, 2 for a wrong command line.";

/// A model server with a SIMULATED GPU: nothing is computed, time passes
#[derive(Parser)]
#[command(name = "penstock-simgpu", version, after_help = EXAMPLE, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tensors: the Open Inference Protocol, and embeddings
    Tensor {
        #[command(flatten)]
        common: Common,
        /// What a batch costs, whatever is in it, on a GPU of speed 1
        #[arg(long, value_name = "TIME", default_value = "40ms", value_parser = humantime::parse_duration)]
        fixed: Duration,
        /// What each row costs more
        #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration)]
        row: Duration,
        /// Rows in a batch
        #[arg(long, value_name = "ROWS", default_value_t = 4)]
        max_batch: u32,
    },
    /// A language model: OpenAI chat completions, streamed or not
    Chat {
        #[command(flatten)]
        common: Common,
        /// What a step costs, whatever is in it, on a GPU of speed 1
        #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration)]
        step: Duration,
        /// What each sequence that gets a token costs more
        #[arg(long, value_name = "TIME", default_value = "500us", value_parser = humantime::parse_duration)]
        sequence: Duration,
        /// What each prompt token costs more that is not cached
        #[arg(long, value_name = "TIME", default_value = "200us", value_parser = humantime::parse_duration)]
        prompt_token: Duration,
        /// Sequences in a step
        #[arg(long, value_name = "N", default_value_t = 32)]
        max_sequences: usize,
        /// Tokens in a step, of prompts and answers
        #[arg(long, value_name = "N", default_value_t = 512)]
        max_tokens: u32,
        /// Memory for keys and values, in blocks of 16 tokens
        #[arg(long, value_name = "BLOCKS", default_value_t = 2048)]
        blocks: usize,
        /// Tokens of an answer on average; max_tokens of the request cuts it off
        #[arg(long, value_name = "TOKENS", default_value_t = 48.0)]
        mean_output: f64,
        /// Tokens in an event of a streamed answer, after the first token, which has one of its own
        #[arg(long, value_name = "TOKENS", default_value_t = 8)]
        stream_interval: u32,
    },
}

#[derive(Args, Clone)]
struct Common {
    /// HTTP/1.1 here
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// How fast the GPU is: 2 takes half the time
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    speed: f64,
    /// A time in which it is slower, counted from the start or the last reset: START+LENGTH*FACTOR, and a stall without *FACTOR
    #[arg(long, value_name = "WINDOW")]
    slow: Vec<Window>,
    /// Not ready for so long after the start or a reset: requests are answered with 503
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    load: Duration,
    /// The model's name
    #[arg(long, value_name = "NAME", default_value = "sim")]
    model: String,
}

fn main() -> Result<()> {
    let command = Cli::parse().command;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, run(command))
}

async fn run(command: Command) -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (common, served) = match command {
        Command::Tensor { common, fixed, row, max_batch } => {
            let cost = tensor::Cost { fixed: fixed.as_secs_f64(), row: row.as_secs_f64(), max_batch };
            let model = tensor::Batcher::new(cost, pace(&common)?);
            (common, Served::Tensor(Device::start(model)))
        }
        Command::Chat {
            common,
            step,
            sequence,
            prompt_token,
            max_sequences,
            max_tokens,
            blocks,
            mean_output,
            stream_interval,
        } => {
            ensure!(
                max_sequences > 0 && blocks > 1,
                "--max-sequences and --blocks must allow for a sequence"
            );
            // A step that is full of answers must still read a token of a prompt.
            ensure!(
                max_tokens as usize > max_sequences,
                "--max-tokens {max_tokens} leaves no token of a prompt beside {max_sequences} sequences"
            );
            let cost = llm::Cost {
                step: step.as_secs_f64(),
                sequence: sequence.as_secs_f64(),
                prompt_token: prompt_token.as_secs_f64(),
                max_sequences,
                max_tokens,
                blocks,
            };
            let device = Device::start(llm::Engine::new(cost, pace(&common)?));
            (common, Served::Chat { device, mean_output, stream_interval: stream_interval.max(1) })
        }
    };
    let listener = TcpListener::bind(common.listen)
        .await
        .with_context(|| format!("cannot listen on {}", common.listen))?;
    announce(&listener)?;
    let server = Rc::new(Server { model: common.model, load: common.load, served });
    tokio::select! {
        done = serve::accept(listener, server) => done,
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
    }
}

fn pace(common: &Common) -> Result<Pace> {
    ensure!(
        common.speed.is_finite() && common.speed > 0.0,
        "--speed {} is not above 0: nothing would ever be done",
        common.speed
    );
    Ok(Pace::new(common.speed, common.slow.clone()))
}

/// One line on stdout, for whoever started us with port 0.
fn announce(listener: &TcpListener) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", listener.local_addr()?)?;
    Ok(out.flush()?)
}
