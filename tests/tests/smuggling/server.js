// A server of Node's own HTTP parser that says of each request what it saw: as a header of its answer, and as a line of
// JSON on standard output. Usage: node server.js HOST PORT
'use strict';

const crypto = require('node:crypto');
const http = require('node:http');

const [host, port] = process.argv.slice(2);
const hex = (text) => Buffer.from(text || '', 'latin1').toString('hex') || '-';
const tell = (seen) => process.stdout.write(JSON.stringify(seen) + '\n');
let connections = 0;

const server = http.createServer({ maxHeaderSize: 96 << 10, keepAliveTimeout: 60_000 }, (request, response) => {
  const digest = crypto.createHash('sha256');
  let length = 0;
  let whole = false;
  const seen = { host: request.headers.host || '', connection: String(request.socket.number) };
  request.on('data', (bytes) => {
    length += bytes.length;
    digest.update(bytes);
  });
  request.on('end', () => {
    whole = true;
    const said = [request.method, hex(seen.host), hex(request.url), length, digest.digest('hex')].join(' ');
    const trailers = request.rawTrailers.filter((_, at) => at % 2 === 0).join(' ').toLowerCase();
    tell({ ...seen, status: 200, line: `${request.method} ${request.url}`, saw: said, trailers });
    response.writeHead(200, { 'x-saw': said, 'content-length': 5 });
    response.end('seen\n');
  });
  request.on('close', () => {
    if (!whole) tell({ ...seen, status: 499, line: `${request.method} ${request.url}`, saw: '', trailers: '' });
  });
});
server.on('connection', (socket) => {
  socket.number = ++connections;
});
server.on('clientError', (error, socket) => {
  // What comes behind what was refused is refused, too.
  if (socket.refused) return;
  socket.refused = true;
  const line = (error.rawPacket || Buffer.alloc(0)).toString('latin1').slice(0, 400);
  // A connection that ends in the middle of a request is told by that request.
  if (error.code !== 'ECONNRESET' && error.code !== 'HPE_INVALID_EOF_STATE') {
    tell({ status: 400, line: `${error.code} ${line}`, host: '', saw: '', trailers: '', connection: String(socket.number) });
  }
  if (socket.writable) socket.end('HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n');
});
const refused = (request, status) => {
  const seen = { host: request.headers.host || '', connection: String(request.socket.number), saw: '', trailers: '' };
  tell({ ...seen, status, line: `${request.method} ${request.url}` });
};
server.on('checkExpectation', (request, response) => {
  refused(request, 417);
  response.writeHead(417, { 'content-length': 0, connection: 'close' });
  response.end();
});
server.on('connect', (request, socket) => {
  refused(request, 405);
  socket.end('HTTP/1.1 405 Method Not Allowed\r\nconnection: close\r\ncontent-length: 0\r\n\r\n');
});
process.on('SIGTERM', () => process.exit(0));
server.listen(Number(port), host);
