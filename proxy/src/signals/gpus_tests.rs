use super::*;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn gpu(uuid: &str) -> Gpu {
    Gpu {
        uuid: uuid.to_owned(),
        memory_used: Some(20.0),
        memory_total: Some(80.0),
        temperature: Some(60.0),
        ..Gpu::default()
    }
}

fn found(gpus: &[Gpu], owned: &Owned, shown: Shown) -> Result<Vec<String>, String> {
    mine(gpus, owned, shown).map(|gpus| gpus.iter().map(|gpu| gpu.uuid.clone()).collect())
}

#[test]
fn a_gpu_is_ours_when_something_says_so() {
    let two = [gpu("GPU-a"), Gpu { pod: Some("team-a/resnet-0".into()), ..gpu("GPU-b") }];
    let visible = |list: &str| Owned { visible: Some(list.into()), ..Owned::default() };
    let declared = Owned { uuids: vec!["GPU-b".into()], ..visible("all") };
    let pod = Owned { pod: "team-a/resnet-0".into(), ..Owned::default() };
    let b = Ok(vec!["GPU-b".to_owned()]);
    let both = Ok(vec!["GPU-a".to_owned(), "GPU-b".to_owned()]);
    for shown in [Shown::Driver, Shown::Exporter] {
        assert_eq!(found(&two, &declared, shown), b);
        assert_eq!(found(&two, &visible("GPU-b"), shown), b);
    }
    assert_eq!(found(&two, &pod, Shown::Exporter), b);
    assert_eq!(found(&two, &visible("0,1"), Shown::Driver), both);
    assert_eq!(found(&two[1..], &Owned::default(), Shown::Driver), b);
}

#[test]
fn doubt_is_told_and_nobody_elses_gpu_is_taken() {
    let two = [gpu("GPU-a"), gpu("GPU-b")];
    let pod = Owned { pod: "team-a/resnet-0".into(), visible: Some("all".into()), ..Owned::default() };
    let why = found(&two, &pod, Shown::Driver).unwrap_err();
    assert!(why.contains("shows 2 GPUs") && why.contains("declare"), "{why}");
    let why = found(&two[..1], &pod, Shown::Exporter).unwrap_err();
    assert!(why.contains("team-a/resnet-0") && why.contains("time slicing"), "{why}");
    let declared = Owned { uuids: vec!["GPU-c".into()], ..Owned::default() };
    let why = found(&two, &declared, Shown::Driver).unwrap_err();
    assert!(why.contains("GPU-c"), "{why}");
    assert!(found(&[], &Owned::default(), Shown::Driver).is_err());
}

#[test]
fn replicas_on_one_gpu_have_one_identity_and_those_on_several_too() {
    let (a, b) = (gpu("GPU-a"), gpu("GPU-b"));
    let one = summary(&[&a], s(1));
    assert_eq!(one.id, Some(GpuId::of_uuid("GPU-a")));
    assert_eq!((one.memory, one.temperature), (Some(0.25), Some(60.0)));
    assert_eq!(summary(&[&a, &b], s(1)).id, summary(&[&b, &a], s(1)).id);
    assert_ne!(summary(&[&a, &b], s(1)).id, one.id);
    let silent = Gpu { memory_total: None, ..gpu("GPU-a") };
    assert_eq!(summary(&[&silent], s(1)).memory, None);
}

#[test]
fn the_worst_gpu_speaks_for_the_pod_and_an_xid_is_remembered() {
    let owned = Owned { visible: Some("0,1".into()), ..Owned::default() };
    let mut follower = Follower { owned: &owned, watches: BTreeMap::new() };
    let (signals, mut source) = (Signals::default(), Source::new("nvml"));
    let gpus = [gpu("GPU-a"), gpu("GPU-b")];
    let mut look = |follower: &mut Follower<'_>, gpus: &[Gpu], at: u64| {
        follower.take(gpus, Shown::Driver, &signals, &mut source, s(at));
        signals.load(s(at)).gpu_health
    };
    assert_eq!(look(&mut follower, &gpus, 0), Some(GpuHealth::Well));
    let hot = [gpu("GPU-a"), Gpu { throttle: Some(0x40), ..gpu("GPU-b") }];
    assert_eq!(look(&mut follower, &hot, 1), Some(GpuHealth::Throttled));
    follower.told(&[("GPU-a".into(), 79)], s(2));
    assert_eq!(look(&mut follower, &gpus, 3), Some(GpuHealth::Failed));
    assert_eq!(look(&mut follower, &gpus, 302), Some(GpuHealth::Well));
}

/// The library is not on this machine: the path of a failure is the one that is really taken.
#[tokio::test]
async fn a_driver_that_does_not_load_gives_way_to_the_exporter() {
    let server = crate::signals::tests::Server::start("/metrics", EXPORTER_PAGE).await;
    let config = Config {
        nvml: Some("/nowhere/libnvidia-ml.so.1".into()),
        dcgm: Some(format!("http://{}", server.address)),
        owned: Owned { pod: "team-a/resnet-0".into(), ..Owned::default() },
        ..Config::default()
    };
    let (signals, epoch) = (Signals::default(), Instant::now());
    let told = async {
        while signals.load(epoch.elapsed()).gpu.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = watch(&config, &signals, epoch) => unreachable!("it never ends"),
        () = told => {}
        () = tokio::time::sleep(s(10)) => panic!("no GPU after ten seconds"),
    }
    let load = signals.load(epoch.elapsed());
    assert_eq!(load.gpu, Some(GpuId::of_uuid("GPU-a")));
    assert_eq!((load.mem_utilization, load.gpu_health), (Some(0.25), Some(GpuHealth::Well)));
}

const EXPORTER_PAGE: &str = "\
DCGM_FI_DEV_FB_USED{gpu=\"0\",UUID=\"GPU-a\",namespace=\"team-a\",pod=\"resnet-0\"} 20000
DCGM_FI_DEV_FB_FREE{gpu=\"0\",UUID=\"GPU-a\",namespace=\"team-a\",pod=\"resnet-0\"} 60000
DCGM_FI_DEV_GPU_TEMP{gpu=\"0\",UUID=\"GPU-a\",namespace=\"team-a\",pod=\"resnet-0\"} 55
DCGM_FI_DEV_FB_USED{gpu=\"1\",UUID=\"GPU-b\",namespace=\"team-b\",pod=\"llm-0\"} 70000
";
