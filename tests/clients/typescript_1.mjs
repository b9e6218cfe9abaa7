// The official TypeScript client 1.x.

import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import {
  ElicitationCompleteNotificationSchema,
  ElicitRequestSchema,
  ToolListChangedNotificationSchema,
} from '@modelcontextprotocol/sdk/types.js';
import { action, asked, capabilities, run, say, url } from './program.mjs';

const client = new Client({ name: 'typescript-1', version: '1' }, { capabilities });
client.setNotificationHandler(ToolListChangedNotificationSchema, () => say({ event: 'changed' }));
if (action !== 'none') {
  client.setRequestHandler(ElicitRequestSchema, asked);
  client.setNotificationHandler(ElicitationCompleteNotificationSchema, ({ params }) =>
    say({ event: 'complete', id: params.elicitationId }),
  );
}
await run(client, () => client.connect(new StreamableHTTPClientTransport(new URL(url))));
