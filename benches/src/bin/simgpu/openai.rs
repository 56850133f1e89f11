//! OpenAI chat completions: what is asked, and the answer, whole or as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use serde::Deserialize;
use serde_json::{Value, json};

use super::device::Ticket;
use super::llm::{Engine, Prompt};
use super::tokens;

/// The text of each token.
const TOKEN: &str = "tok ";
/// Tokens of an answer when the request does not limit it.
const MAX_TOKENS: u32 = 256;

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
    #[serde(default)]
    stream: bool,
    #[serde(alias = "max_completion_tokens")]
    max_tokens: Option<u32>,
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: Value,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// What a request asks for.
#[derive(Debug)]
pub(crate) struct Asked {
    /// For the model.
    pub(crate) prompt: Prompt,
    /// As events, as they come.
    pub(crate) stream: bool,
    /// The last event but one says what was used.
    pub(crate) include_usage: bool,
}

impl Chat {
    /// What the model reads: a template that is as plain as can be.
    fn text(&self) -> Result<String, String> {
        if self.messages.is_empty() {
            return Err("messages is empty".to_owned());
        }
        let mut text = String::new();
        for message in &self.messages {
            text.push_str(&message.role);
            text.push('\n');
            match &message.content {
                Value::String(content) => text.push_str(content),
                other => text.push_str(&other.to_string()),
            }
            text.push('\n');
        }
        Ok(text)
    }
}

/// What vLLM's router asks before it chooses by prefix: the prompt as tokens.
pub(crate) fn render(body: &[u8]) -> Result<Value, String> {
    let chat: Chat = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    Ok(json!({"token_ids": tokens::ids(&chat.text()?)}))
}

/// Reads a request. The answer's length is the model's own affair, `mean_output` on average.
pub(crate) fn chat(body: &[u8], mean_output: f64) -> Result<Asked, String> {
    let chat: Chat = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let text = chat.text()?;
    let output = tokens::output(&text, mean_output, chat.max_tokens.unwrap_or(MAX_TOKENS));
    Ok(Asked {
        prompt: Prompt { blocks: tokens::blocks(&text), tokens: tokens::count(&text), output },
        stream: chat.stream,
        include_usage: chat.stream_options.is_some_and(|options| options.include_usage),
    })
}

fn usage(prompt: u32, output: u32) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output})
}

/// The whole answer.
pub(crate) fn answer(model: &str, prompt: &Prompt) -> Value {
    let message = json!({"role": "assistant", "content": TOKEN.repeat(prompt.output as usize)});
    let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
    json!({"id": "simulated", "object": "chat.completion", "created": 0, "model": model, "choices": [choice],
        "usage": usage(prompt.tokens, prompt.output)})
}

/// The answer as events. It ends without `[DONE]` when the GPU was reset under it.
pub(crate) struct Events {
    ticket: Ticket<Engine>,
    model: String,
    prompt_tokens: u32,
    include_usage: bool,
    interval: u32,
    /// Tokens so far, and those of them that no event has told.
    made: u32,
    untold: u32,
    over: bool,
}

impl Events {
    pub(crate) fn new(
        ticket: Ticket<Engine>,
        model: &str,
        prompt_tokens: u32,
        interval: u32,
        include_usage: bool,
    ) -> Self {
        let model = model.to_owned();
        Self { ticket, model, prompt_tokens, include_usage, interval, made: 0, untold: 0, over: false }
    }

    fn event(&self, choices: Value, usage: Option<Value>) -> String {
        let mut chunk = json!({"id": "simulated", "object": "chat.completion.chunk", "created": 0,
            "model": self.model, "choices": choices});
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        format!("data: {chunk}\n\n")
    }

    /// The event for all tokens that were not told yet.
    fn tell(&mut self, done: bool) -> String {
        let mut delta = json!({"content": TOKEN.repeat(self.untold as usize)});
        if self.made == self.untold {
            delta["role"] = "assistant".into();
        }
        self.untold = 0;
        let reason = done.then_some("stop");
        let mut text = self.event(json!([{"index": 0, "delta": delta, "finish_reason": reason}]), None);
        if done && self.include_usage {
            text += &self.event(json!([]), Some(usage(self.prompt_tokens, self.made)));
        }
        if done {
            text += "data: [DONE]\n\n";
        }
        text
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if self.over {
                return Poll::Ready(None);
            }
            let Some(done) = ready!(self.ticket.told.poll_recv(cx)) else { return Poll::Ready(None) };
            self.made += 1;
            self.untold += 1;
            self.over = done;
            if done || self.made == 1 || self.untold >= self.interval {
                return Poll::Ready(Some(Ok(Frame::data(self.tell(done).into()))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::llm::Cost;
    use crate::pace::Pace;
    use http_body_util::BodyExt as _;
    use tokio::task::LocalSet;

    #[test]
    fn two_turns_of_a_conversation_begin_alike() {
        let system = "You are terse. ".repeat(20);
        let turn = |more: &str| {
            let body = format!(
                r#"{{"messages":[{{"role":"system","content":"{system}"}},{{"role":"user","content":"hi"}}{more}],"stream":true}}"#
            );
            chat(body.as_bytes(), 10.0).unwrap().prompt
        };
        let first = turn("");
        let second = turn(
            r#",{"role":"assistant","content":"hello"},{"role":"user","content":"and now something longer"}"#,
        );
        assert!(first.blocks.len() >= 4 && second.blocks.starts_with(&first.blocks));
        assert!(second.tokens > first.tokens);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_token_has_an_event_of_its_own_and_the_last_ends_the_stream() {
        let cost = Cost {
            step: 0.01,
            sequence: 0.0,
            prompt_token: 0.0,
            max_sequences: 4,
            max_tokens: 64,
            blocks: 64,
        };
        let work = async {
            let device = Device::start(Engine::new(cost, Pace::new(1.0, Vec::new())));
            let ticket = device.submit(Prompt { blocks: Vec::new(), tokens: 3, output: 12 });
            let mut events = Events::new(ticket, "sim", 3, 8, true);
            let mut tokens = Vec::new();
            let mut text = String::new();
            while let Some(frame) = events.frame().await {
                let data = frame.unwrap().into_data().unwrap();
                let event = String::from_utf8(data.to_vec()).unwrap();
                tokens.push(event.matches(TOKEN).count());
                text += &event;
            }
            assert_eq!(tokens, [1, 8, 3]);
            assert!(
                text.ends_with("data: [DONE]\n\n") && text.contains(r#""completion_tokens":12"#),
                "{text}"
            );
            assert_eq!(text.matches(r#""role":"assistant""#).count(), 1);
        };
        LocalSet::new().run_until(work).await;
    }
}
