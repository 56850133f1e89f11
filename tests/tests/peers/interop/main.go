// The interop server and client of grpc-go, as far as they need no cloud, and a client that goes on and on.
//
//	interop server [::]:8000
//	interop cases                            # the names, one a line
//	interop client 10.0.0.1:80 large_unary   # exit status 1, and why, if the case fails
//	interop steady 10.0.0.1:80               # calls until its standard input ends, and then one line of JSON
//	interop stream 10.0.0.1:80               # one stream with a message a tenth of a second; tells how it ended
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	"google.golang.org/grpc/status"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

// The cases of gRPC's interop-test-descriptions.md that this package has and that need no credentials of a cloud.
var cases = map[string]func(context.Context, *grpc.ClientConn){
	"empty_unary":                 service(interop.DoEmptyUnaryCall),
	"large_unary":                 service(interop.DoLargeUnaryCall),
	"client_streaming":            service(interop.DoClientStreaming),
	"server_streaming":            service(interop.DoServerStreaming),
	"ping_pong":                   service(interop.DoPingPong),
	"empty_stream":                service(interop.DoEmptyStream),
	"timeout_on_sleeping_server":  service(interop.DoTimeoutOnSleepingServer),
	"cancel_after_begin":          service(interop.DoCancelAfterBegin),
	"cancel_after_first_response": service(interop.DoCancelAfterFirstResponse),
	"status_code_and_message":     service(interop.DoStatusCodeAndMessage),
	"special_status_message":      service(interop.DoSpecialStatusMessage),
	"custom_metadata":             service(interop.DoCustomMetadata),
	"unimplemented_method": func(ctx context.Context, connection *grpc.ClientConn) {
		interop.DoUnimplementedMethod(ctx, connection)
	},
	"unimplemented_service": func(ctx context.Context, connection *grpc.ClientConn) {
		interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(connection))
	},
}

type call = func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption)

func service(do call) func(context.Context, *grpc.ClientConn) {
	return func(ctx context.Context, connection *grpc.ClientConn) {
		do(ctx, testgrpc.NewTestServiceClient(connection))
	}
}

func main() {
	log.SetFlags(0)
	switch {
	case len(os.Args) == 2 && os.Args[1] == "cases":
		names := make([]string, 0, len(cases))
		for name := range cases {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			fmt.Println(name)
		}
	case len(os.Args) == 3 && os.Args[1] == "server":
		serve(os.Args[2])
	case len(os.Args) == 4 && os.Args[1] == "client":
		do, known := cases[os.Args[3]]
		if !known {
			log.Fatalf("there is no case %q", os.Args[3])
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		do(ctx, connect(os.Args[2]))
	case len(os.Args) == 3 && os.Args[1] == "steady":
		steady(connect(os.Args[2]))
	case len(os.Args) == 3 && os.Args[1] == "stream":
		stream(connect(os.Args[2]))
	default:
		log.Fatal("server ADDR | cases | client ADDR CASE | steady ADDR | stream ADDR")
	}
}

func connect(address string) *grpc.ClientConn {
	connection, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("interop.test"))
	if err != nil {
		log.Fatal(err)
	}
	return connection
}

// serve ends as servers do that are asked to: it finishes what it has.
func serve(address string) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(server, interop.NewTestServer())
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	go func() {
		<-terminate
		server.GracefulStop()
	}()
	fmt.Println("listening")
	if err := server.Serve(listener); err != nil {
		log.Fatal(err)
	}
}

type tally struct {
	Calls  int      `json:"calls"`
	Failed int      `json:"failed"`
	Errors []string `json:"errors"`
}

// steady makes calls, four at a time.
func steady(connection *grpc.ClientConn) {
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, bufio.NewReader(os.Stdin))
		stop()
	}()
	client := testgrpc.NewTestServiceClient(connection)
	var (
		all  tally
		lock sync.Mutex
		wait sync.WaitGroup
	)
	for range 4 {
		wait.Go(func() {
			for ctx.Err() == nil {
				// A call is not cancelled by the end: it is counted.
				limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				request := &testpb.SimpleRequest{ResponseSize: 1000, Payload: &testpb.Payload{Body: make([]byte, 1000)}}
				_, err := client.UnaryCall(limit, request)
				cancel()
				lock.Lock()
				all.Calls++
				if err != nil {
					all.Failed++
					if len(all.Errors) < 10 {
						all.Errors = append(all.Errors, err.Error())
					}
				}
				lock.Unlock()
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	wait.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(all); err != nil {
		log.Fatal(err)
	}
}

// stream keeps one stream as long as it may.
func stream(connection *grpc.ClientConn) {
	calls, err := testgrpc.NewTestServiceClient(connection).FullDuplexCall(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	begun := time.Now()
	messages := 0
	for {
		request := &testpb.StreamingOutputCallRequest{ResponseParameters: []*testpb.ResponseParameters{{Size: 100}}}
		// What is wrong is told by Recv.
		_ = calls.Send(request)
		if _, err = calls.Recv(); err != nil {
			break
		}
		messages++
		fmt.Println("message", messages)
		time.Sleep(100 * time.Millisecond)
	}
	ended := status.Convert(err)
	fmt.Printf("ended %s after %d messages and %d ms: %s\n",
		ended.Code(), messages, time.Since(begun).Milliseconds(), ended.Message())
}
