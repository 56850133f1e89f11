use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

fn ask(api: Api, body: &Value) -> Ask {
    Ask::read(api, body.to_string().as_bytes())
}

fn in_common(a: &Ask, b: &Ask) -> usize {
    a.blocks.iter().zip(&b.blocks).take_while(|(a, b)| a == b).count()
}

#[test]
fn paths_lead_to_their_api_wherever_they_are_mounted() {
    for (path, api) in [
        ("/v1/chat/completions", Some(Api::Chat)),
        ("/openai/v1/chat/completions/?a=b", Some(Api::Chat)),
        ("/v1/completions", Some(Api::Completions)),
        ("/v1/responses", Some(Api::Responses)),
        ("/v1/embeddings", Some(Api::Embeddings)),
        ("/v1/responses/resp_1", None),
        ("/v1/models", None),
        ("", None),
    ] {
        assert_eq!(Api::of_path(path), api, "{path}");
    }
}

#[test]
fn a_chat_is_read() {
    let body = json!({
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{}", "A".repeat(4000))}},
            ]},
        ],
        "stream": true,
        "stream_options": {"include_usage": true},
        "max_completion_tokens": 200,
        "n": 2,
        "user": "ada",
        "lora_path": "sql",
        "tools": [{"type": "function", "function": {"name": "f", "model": "not this"}}],
    });
    let read = ask(Api::Chat, &body);
    assert_eq!(read.model.as_deref(), Some("meta-llama/Llama-3.1-8B-Instruct"));
    assert_eq!((read.stream, read.max_tokens, read.choices), (Some(true), Some(200), Some(2)));
    assert_eq!((read.adapter.as_deref(), read.attachments), (Some("sql"), 1));
    assert!(read.complete && !read.prompt_open && read.user.is_some() && read.session.is_none());
    let text = "systemBe brief.usertextWhat is this?image_url".len() as u64;
    assert_eq!(read.prompt_bytes, text);
    assert_eq!(read.prompt_tokens(None), text.div_ceil(4) + TOKENS_PER_ATTACHMENT);
    assert_eq!((read.answer_tokens(Api::Chat, 500), read.answer_tokens(Api::Chat, 50)), (400, 100));
}

#[test]
fn a_completion_may_be_text_or_tokens() {
    let text = ask(Api::Completions, &json!({"prompt": "x".repeat(1000), "model": "m", "max_tokens": 16}));
    assert_eq!((text.prompt_tokens(None), text.blocks.len(), text.max_tokens), (250, 3, Some(16)));
    let tokens: Vec<_> = (10_000..10_100).collect();
    let ids = ask(Api::Completions, &json!({"prompt": tokens, "model": "m"}));
    assert_eq!((ids.prompt_tokens(None), ids.prompt_bytes, ids.blocks.len()), (100, 0, 2));
    let many = ask(Api::Completions, &json!({"prompt": ["ab", "c"], "model": "m"}));
    assert_eq!(many.prompt_bytes, 3);
}

#[test]
fn a_response_has_instructions_input_and_a_conversation() {
    let body = json!({
        "model": "gpt-oss", "instructions": "Be kind.", "conversation": {"id": "conv_1"}, "max_output_tokens": 9,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        "previous_response_id": "resp_7", "stream": false,
    });
    let read = ask(Api::Responses, &body);
    assert_eq!((read.stream, read.max_tokens), (Some(false), Some(9)));
    assert!(read.session.is_some() && read.previous.is_some() && read.session != read.previous);
    assert_eq!(read.prompt_bytes, "Be kind.userinput_textHello".len() as u64);
    let same = ask(Api::Responses, &json!({"prompt_cache_key": "conv_1"}));
    assert_eq!(same.session, read.session, "a key is a key, whatever it is called");
}

#[test]
fn embeddings_have_no_answer_to_wait_for() {
    let read = ask(Api::Embeddings, &json!({"input": ["one text", "another"], "model": "bge"}));
    assert_eq!((read.prompt_tokens(None), read.answer_tokens(Api::Embeddings, 500)), (4, 0));
}

#[test]
fn a_chat_that_goes_on_has_all_earlier_blocks_in_common() {
    let mut messages = vec![json!({"role": "system", "content": "rules ".repeat(500)})];
    let mut before: Option<Ask> = None;
    for turn in 0..5 {
        messages.push(json!({"role": "user", "content": format!("question {turn} {}", "?".repeat(300))}));
        let read = ask(Api::Chat, &json!({"model": "m", "messages": messages}));
        if let Some(before) = &before {
            assert_eq!(in_common(before, &read), before.blocks.len());
            assert!(read.blocks.len() > before.blocks.len());
        }
        messages.push(json!({"role": "assistant", "content": format!("answer {turn}").repeat(30)}));
        before = Some(read);
    }
    let other = ask(Api::Chat, &json!({"messages": [{"role": "system", "content": "RULES ".repeat(500)}]}));
    assert_eq!(in_common(&other, &before.unwrap()), 0);
}

#[test]
fn a_body_of_which_only_the_beginning_was_seen_is_read_up_to_there() {
    let body = json!({"messages": [{"role": "user", "content": "long ".repeat(20_000)}], "model": "last"});
    let body = body.to_string();
    let mut reader = Reader::new(Api::Chat, 16 << 10);
    let wanted: Vec<_> = body.as_bytes().chunks(4096).map(|chunk| reader.push(chunk)).collect();
    assert_eq!(wanted[..5], [true, true, true, false, false]);
    let read = reader.finish();
    assert_eq!((read.seen, read.model.as_deref(), read.complete), (16 << 10, None, false));
    assert!(read.prompt_open && read.blocks.len() == 63);
    let tokens = read.prompt_tokens(Some(body.len() as u64));
    assert!((24_990..25_040).contains(&tokens), "{tokens} tokens are not about 25,000");
    let whole = Ask::read(Api::Chat, body.as_bytes());
    assert_eq!(in_common(&whole, &read), read.blocks.len());
    assert_eq!(whole.model.as_deref(), Some("last"));
}

#[test]
fn what_is_no_such_request_says_nothing() {
    for body in [
        "",
        "[]",
        "null",
        "\"model\"",
        "[{\"model\":\"x\"}]",
        "{\"model\":7,\"stream\":\"yes\",\"n\":-1}",
        "}{",
    ] {
        let read = Ask::read(Api::Chat, body.as_bytes());
        let silent = Ask { seen: read.seen, complete: read.complete, ..Ask::default() };
        assert_eq!(read, silent, "{body}");
    }
    let long = json!({"model": "m".repeat(LONG), "user": "u".repeat(LONG)});
    let read = ask(Api::Chat, &long);
    assert!(read.model.is_none() && read.user.is_some());
}

const LONG: usize = 100_000;

/// What a fuzzer does, with a seed: valid bodies with bytes changed, dropped and doubled, cut anywhere.
#[test]
fn mutated_bodies_never_panic_and_stay_bounded() {
    let body = json!({
        "model": "m", "messages": [{"role": "user", "content": "h\u{e9}llo \"x\" \\ \u{1f600} ".repeat(60)}],
        "stream": true, "max_tokens": 12, "lora_path": ["a", null], "conversation": {"id": "c"},
        "prompt": [1, 2, [3, 4]], "input": {"a": [{"b": "c"}]},
    });
    let body = body.to_string().into_bytes();
    // xorshift64 (Marsaglia 2003): the same bodies each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    for round in 0..20_000 {
        let mut mutated = body.clone();
        for _ in 0..=next(6) {
            let at = next(mutated.len() - 1);
            match next(4) {
                0 => mutated[at] = next(256) as u8,
                1 if mutated.len() > 2 => drop(mutated.remove(at)),
                2 => mutated.insert(at, b"\"\\{}[],:u"[next(9)]),
                _ => mutated.truncate(at.max(2)),
            }
        }
        let api = [Api::Chat, Api::Completions, Api::Responses, Api::Embeddings][round % 4];
        let mut reader = Reader::new(api, 4096);
        for chunk in mutated.chunks(1 + next(64)) {
            reader.push(chunk);
        }
        let read = reader.finish();
        assert!(read.blocks.len() <= 4096 / BLOCK && read.seen <= 4096);
        read.prompt_tokens(Some(u64::MAX));
        read.answer_tokens(api, u64::MAX);
    }
}

proptest! {
    #[test]
    fn any_cut_of_a_body_yields_the_leading_blocks(
        texts in prop::collection::vec("[ -~é漢😀\\n\"]{0,400}", 1..4),
        cut in any::<prop::sample::Index>(),
        chunk in 1usize..200,
    ) {
        let messages: Vec<_> = texts.iter().map(|text| json!({"role": "user", "content": text})).collect();
        let body = json!({"messages": messages, "model": "m"}).to_string();
        let whole = Ask::read(Api::Chat, body.as_bytes());
        let mut reader = Reader::new(Api::Chat, PREFIX);
        let end = cut.index(body.len() + 1);
        body.as_bytes()[..end].chunks(chunk).for_each(|chunk| {
            reader.push(chunk);
        });
        let part = reader.finish();
        prop_assert_eq!(in_common(&whole, &part), part.blocks.len());
        prop_assert!(part.prompt_bytes <= whole.prompt_bytes);
        let bytes: usize = texts.iter().map(|text| text.len() + "user".len()).sum();
        prop_assert_eq!(whole.prompt_bytes, bytes as u64);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        for api in [Api::Chat, Api::Completions, Api::Responses, Api::Embeddings] {
            Ask::read(api, &bytes).prompt_tokens(None);
        }
    }
}
