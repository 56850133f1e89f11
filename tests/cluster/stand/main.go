// Stand is what the cluster's own tests put into pods: one static program, whose first argument says what it is.
//
//	stand pause                        holds a pod's namespaces and reaps what is left in them, as Kubernetes' pause does
//	stand serve ADDRESS [FAILING]      answers every request with the name of its host; from SIGUSR1 on, FAILING of a hundred with a 500
//	stand get URL [FILE]               prints the answer; exit status 1 if it is not 2xx; a file is posted as JSON
//	stand lookup NAME                  prints the addresses of a name
//	stand load URL SECONDS RATE [FILE] asks so many times a second, then prints what came back, as JSON
//	stand webhook ADDRESS CERT KEY     admits pods, and labels them
//	stand exit CODE
//
// Before URL there may be -H NAME:VALUE, for a header of each request.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("stand: say what: pause, serve, get, lookup, load, webhook or exit")
	}
	arguments := os.Args[2:]
	argument := func(at int) string {
		if at >= len(arguments) {
			log.Fatalf("stand %s: too few arguments", os.Args[1])
		}
		return arguments[at]
	}
	switch os.Args[1] {
	case "pause":
		pause()
	case "serve":
		failing := 0
		if len(arguments) > 1 {
			failing = number(arguments[1])
		}
		serve(argument(0), failing)
	case "get":
		arguments = named(arguments)
		get(argument(0), arguments[1:])
	case "lookup":
		lookup(argument(0))
	case "load":
		arguments = named(arguments)
		load(argument(0), number(argument(1)), number(argument(2)), arguments[3:])
	case "webhook":
		webhook(argument(0), argument(1), argument(2))
	case "exit":
		os.Exit(number(argument(0)))
	default:
		log.Fatalf("stand: there is no %s", os.Args[1])
	}
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil {
		log.Fatalf("stand: %v", err)
	}
	return value
}

func pause() {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGINT, syscall.SIGTERM)
	for which := range signals {
		if which != syscall.SIGCHLD {
			return
		}
		// One signal may stand for several children.
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

func serve(address string, failing int) {
	name, err := os.Hostname()
	if err != nil {
		log.Fatal(err)
	}
	faulty := make(chan os.Signal, 1)
	signal.Notify(faulty, syscall.SIGUSR1)
	var percent, asked atomic.Int64
	go func() {
		for range faulty {
			percent.Store(int64(failing))
		}
	}()
	server := &http.Server{Addr: address, Handler: http.HandlerFunc(func(answer http.ResponseWriter, _ *http.Request) {
		// Spread evenly: 20 of a hundred are each fifth.
		of := percent.Load()
		if turn := asked.Add(1) % 100; (turn+1)*of/100 > turn*of/100 {
			answer.WriteHeader(http.StatusInternalServerError)
		}
		fmt.Fprintln(answer, name)
	})}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	stopped := make(chan struct{})
	go func() {
		<-ended
		server.Shutdown(context.Background())
		close(stopped)
	}()
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		log.Fatal(err)
	}
	<-stopped
}

// What each request has besides.
var headers = http.Header{}

// named takes the headers off that are before all else.
func named(arguments []string) []string {
	for len(arguments) > 1 && arguments[0] == "-H" {
		name, value, found := strings.Cut(arguments[1], ":")
		if !found {
			log.Fatalf("stand: -H %s: write NAME:VALUE", arguments[1])
		}
		headers.Add(name, value)
		arguments = arguments[2:]
	}
	return arguments
}

func get(url string, file []string) {
	client := http.Client{Timeout: 10 * time.Second}
	answer, err := send(&client, url, posted(file))
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		log.Fatal(err)
	}
	if answer.StatusCode/100 != 2 {
		log.Fatal(answer.Status)
	}
}

func lookup(name string) {
	addresses, err := net.LookupHost(name)
	if err != nil {
		log.Fatal(err)
	}
	for _, address := range addresses {
		fmt.Println(address)
	}
}

// What came back, and what did not.
type outcome struct {
	Requests int `json:"requests"`
	Ok       int `json:"ok"`
	// By status or error, and when the first of each came.
	Failed map[string]int    `json:"failed"`
	First  map[string]string `json:"first"`
	// By how an answer begins.
	Answers map[string]int `json:"answers"`
	// By answer, status or error: when the last request of which this became was sent.
	Last map[string]string `json:"last"`
	Longest float64        `json:"longest_ms"`
}

// What is to be posted; nothing where no file is named.
func posted(file []string) string {
	if len(file) == 0 {
		return ""
	}
	text, err := os.ReadFile(file[0])
	if err != nil {
		log.Fatal(err)
	}
	return string(text)
}

// load asks at a rate that does not depend on the answers. A file, if one is given, is posted as JSON. Each fourth request has a
// connection of its own, as that of a client that has just started.
func load(url string, seconds, rate int, file []string) {
	body := posted(file)
	kept := http.Client{Timeout: 10 * time.Second}
	kept.Transport = &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 5 * time.Second}
	fresh := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	result := outcome{Failed: map[string]int{}, Answers: map[string]int{}, First: map[string]string{}, Last: map[string]string{}}
	lasts := map[string]time.Time{}
	var lock sync.Mutex
	var under sync.WaitGroup
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	tick := time.NewTicker(time.Second / time.Duration(rate))
	until := time.After(time.Duration(seconds) * time.Second)
	asked := 0
	for running := true; running; {
		select {
		case <-until:
			running = false
		case <-ended:
			running = false
		case <-tick.C:
			under.Add(1)
			client := &kept
			if asked++; asked%4 == 0 {
				client = &fresh
			}
			go func() {
				defer under.Done()
				began := time.Now()
				answer, failure := ask(client, url, body)
				took := float64(time.Since(began).Microseconds()) / 1000
				lock.Lock()
				defer lock.Unlock()
				result.Requests++
				result.Longest = max(result.Longest, took)
				// One of the two is empty.
				if became := answer + failure; began.After(lasts[became]) {
					lasts[became] = began
				}
				if failure != "" {
					if result.Failed[failure]++; result.Failed[failure] == 1 {
						result.First[failure] = began.UTC().Format(time.RFC3339Nano)
					}
					return
				}
				result.Ok++
				result.Answers[answer]++
			}()
		}
	}
	under.Wait()
	for became, at := range lasts {
		result.Last[became] = at.UTC().Format(time.RFC3339Nano)
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		log.Fatal(err)
	}
}

// send posts the body; without one it gets.
func send(client *http.Client, url, body string) (*http.Response, error) {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header = headers.Clone()
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	return client.Do(request)
}

func ask(client *http.Client, url, body string) (string, string) {
	answer, err := send(client, url, body)
	if err != nil {
		return "", err.Error()
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return "", err.Error()
	}
	if answer.StatusCode/100 != 2 {
		return "", fmt.Sprintf("%s %s %.200s", answer.Status, answer.Header.Get("penstock-error"), text)
	}
	return fmt.Sprintf("%.60s", text), ""
}

// Labels every pod that it is asked about.
func webhook(address, certificate, key string) {
	handler := func(answer http.ResponseWriter, asked *http.Request) {
		var review struct {
			ApiVersion string `json:"apiVersion"`
			Kind       string `json:"kind"`
			Request    struct {
				Uid string `json:"uid"`
			} `json:"request"`
		}
		if err := json.NewDecoder(asked.Body).Decode(&review); err != nil {
			http.Error(answer, err.Error(), http.StatusBadRequest)
			return
		}
		patch := []byte(`[{"op": "add", "path": "/metadata/labels/stand", "value": "admitted"}]`)
		answer.Header().Set("Content-Type", "application/json")
		json.NewEncoder(answer).Encode(map[string]any{
			"apiVersion": review.ApiVersion,
			"kind":       review.Kind,
			"response":   map[string]any{"uid": review.Request.Uid, "allowed": true, "patchType": "JSONPatch", "patch": patch},
		})
	}
	log.Fatal(http.ListenAndServeTLS(address, certificate, key, http.HandlerFunc(handler)))
}
